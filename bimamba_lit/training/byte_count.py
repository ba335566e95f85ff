"""Counting the bytes that tensors take, as they come and go, with nothing computed.

Under torch's ``FakeTensorMode`` operations give tensors of the right size without values. :class:`ByteCount` sees every
one of them, so its figures follow the code that runs and no formula.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bimamba_lit.kernels.configurations import compiling_for

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
            case _aten.mm.dtype_out | _aten.addmm.dtype_out:
                out = kwargs["out"]
            case _ if (operation := OPDEFS.get(func.name())) is not None:
                with self:  # what it holds while it runs counts too
                    out = operation._init_fn(*args, **(kwargs or {}))
            case _:
                out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.label)
        self._look()
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

    def _look(self) -> None:
        parts = self.weigh(self.now, self.label)
        if sum(parts.values()) > sum(self.most.values()):
            self.most = parts


@contextmanager
def no_kernels() -> Iterator[None]:
    """Have operations that are written in Triton make their tensors as on a GPU and start no kernel."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:  # where there is no Triton, none is chosen either
        yield
        return
    with mock.patch.object(JITFunction, "run", lambda *_, **__: None), compiling_for("sm_90"):
        yield
