"""The Hessian of a layer's inputs, taken while its block runs.

Inputs are seen where the layer's weight is multiplied, in ``F.linear`` or ``@``, and not by a hook on the layer: blocks
of other libraries read ``in_proj.weight`` or ``out_proj.weight`` and never call the layer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class InputHessian:
    """Adds up the Hessian of one layer, the first of several that the block multiplies by; see :meth:`watch`.

    Args:
        layers: The layers that are still to be fitted, by name.

    Attributes:
        name: The layer; None until one of them was multiplied by.
        tokens: Inputs counted so far.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._names = {id(layer.weight): name for name, layer in layers.items()}
        self.name: str | None = None
        self.tokens = 0
        self._sum: Tensor | None = None

    def watch(self, run: Callable[[], Any]) -> None:
        """Run a block as far as its first product with the layer's weight, and count the inputs of it."""
        try:
            with _Products(self._take):
                run()
        except _Reached:
            pass

    def mean(self) -> Tensor:
        """Return the Hessian ``(2 / N) X^T X`` of the N inputs X, ``(I, I)`` fp32."""
        assert self._sum is not None
        return self._sum * (2 / self.tokens)

    def _take(self, weight: object, x: Callable[[], Tensor]) -> None:
        name = self._names.get(id(weight))
        if name is None or self.name not in (None, name):
            return
        self.name = name
        inputs = x().detach()
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._sum is None:
            self._sum = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        self._sum.addmm_(inputs.T, inputs)
        self.tokens += len(inputs)
        raise _Reached


class _Reached(Exception):
    """The block came to the product that was waited for: what it does after that is of no interest."""


class _Products(TorchFunctionMode):
    """Tells ``take`` of every product with a weight: the weight, and what gives its inputs ``(..., I)``."""

    def __init__(self, take: Callable[[object, Callable[[], Tensor]], None]) -> None:
        super().__init__()
        self._take = take

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            self._take(given["weight"], lambda: given["input"])
        elif func in _PRODUCTS and len(args) == 2:
            self._take(args[0], lambda: args[1].mT)
        return func(*args, **kwargs)
