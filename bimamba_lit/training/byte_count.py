"""Counting the bytes that tensors take, as they come and go, with nothing computed.

Under torch's ``FakeTensorMode`` operations give tensors of the right size without values. :class:`ByteCount` sees every
one of them, so its figures follow the code that runs and no formula.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten


class ByteCount(TorchDispatchMode):
    """Counts the bytes of tensors by label, and keeps the labels' bytes at the moment when there were most in all.

    A tensor gets the label in force when it is made. Where values are asked for, of which there are none, every
    position counts, nothing is out of range, and what is compared is equal.

    Args:
        weigh: Called with the bytes by label and the label in force; returns the bytes of a device by part.
    """

    def __init__(self, weigh: Callable[[Counter[str], str], dict[str, int]]) -> None:
        super().__init__()
        self.weigh = weigh
        self.label = "other"
        self.now: Counter[str] = Counter()
        self.most: dict[str, int] = {}
        self._known: Any = WeakIdKeyDictionary()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Give the tensors that are made in a block a label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def add(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors that are there already, or give others the label."""
        for tensor in tensors:
            self._count(tensor, label, again=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func:
            case _aten._local_scalar_dense.default:
                return args[0].dtype != torch.bool
            case _aten.equal.default | _aten.allclose.default:
                return True
            case _aten.nonzero.default:
                out = torch.arange(args[0].numel(), device=args[0].device)[:, None].expand(-1, max(args[0].ndim, 1))
            case _:
                out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.label)
        self._look(_inside(func, args))
        return out

    def _count(self, tensor: Tensor, label: str, again: bool = False) -> None:
        storage = tensor.untyped_storage()
        if (entry := self._known.get(storage)) is not None:
            if again:
                self.now[entry[0]] -= entry[1]
                entry[0] = label
                self.now[label] += entry[1]
            return
        entry = [label, storage.nbytes()]
        self._known[storage] = entry
        self.now[label] += entry[1]
        weakref.finalize(storage, self._forget, entry)

    def _forget(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]

    def _look(self, inside: int) -> None:
        here = self.now + Counter({self.label: inside})
        parts = self.weigh(here, self.label)
        if sum(parts.values()) > sum(self.most.values()):
            self.most = parts


def _inside(func: Any, args: Any) -> int:
    """Return the bytes of the logits that the Triton form of the distillation loss holds within one operation."""
    if func.name() != "bimamba_lit::distillation_loss":
        return 0
    hidden_s, head_s, hidden_t, head_t, *_ = args
    narrow, narrow_t, chunk = args[6], args[7], args[11]
    logits = min(chunk, len(hidden_s)) * len(head_s)
    size = logits * (4 if narrow == torch.float32 else 4 + narrow.itemsize)
    size += 0 if head_s.dtype == narrow else head_s.numel() * narrow.itemsize
    if hidden_t is not None and head_t is not None:
        size += 4 * logits + (0 if head_t.dtype == narrow_t else head_t.numel() * narrow_t.itemsize)
    return size
