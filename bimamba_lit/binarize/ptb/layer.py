"""The layer that holds what a post-training scheme made of one ``nn.Linear``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit.binarize.kept import Kept
from bimamba_lit.binarize.linear import DEPLOYED_BITS
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.errors import UserError
from bimamba_lit.kernels.linear import linear

PREFIX = "ptb."
"""What tells a post-training scheme's name from that of a trained one: ``ptb.ScaledSign``, ``ScaledSign``."""


class PTBLinear(nn.Module):
    """A layer fitted after training: its buffers are the parts that are stored, bit for bit, and nothing is learnable.

    The dense weight is formed when it is first needed and kept for as long as the parts stay the same.

    Args:
        fitted: The layer that was fitted; its sizes, its bias and the dtype of its weight are taken over.
        scheme: The scheme that fitted it.
        parts: What the scheme stores, by name; see :class:`PTBResult`.
    """

    bias: Tensor | None

    def __init__(self, fitted: nn.Linear, scheme: PTBScheme, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.in_features = fitted.in_features
        self.out_features = fitted.out_features
        self._scheme = scheme
        self._names = tuple(parts)
        self._dtype = fitted.weight.dtype
        self._kept = Kept()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("bias", None if fitted.bias is None else fitted.bias.detach().clone())

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the layer is stored as, by name."""
        return {name: self.get_buffer(name) for name in self._names}

    @property
    def weight(self) -> Tensor:
        """The dense weight ``(O, I)`` that the parts stand for, in the dtype that the model is in."""
        parts = self.parts

        def decoded() -> Tensor:
            return self._scheme.decode(parts, self.out_features, self.in_features).to(self._dtype)

        return self._kept.get(decoded, parts.values(), self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``(..., I)`` by the weight and add the bias: ``(..., O)``."""
        return linear(x, self.weight, self.bias)

    def train(self, mode: bool = True) -> "PTBLinear":
        """Set training or evaluation mode; the dense weight is let go."""
        self._kept.clear()
        return super().train(mode)

    def terms(self) -> dict[str, Tensor] | None:
        """Return the terms that go with the signs where the weight is one sign each, else None."""
        return self._scheme.terms(self.parts)

    def packed_signs(self) -> Tensor:
        """Return the signs as bits, ``(O, ceil(I / 8))`` uint8, of a weight that is one sign each."""
        return self.get_buffer("signs")

    def dense(self) -> nn.Linear:
        """Return an ``nn.Linear`` of the same weight and bias."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def storage(self) -> dict[str, int]:
        """Return the bits that the layer is stored in, by part: those of the parts' own bytes; the bias in 16 bits."""
        bits = {name: 8 * part.nbytes for name, part in self.parts.items()}
        if self.bias is not None:
            bits["bias"] = DEPLOYED_BITS * self.bias.numel()
        return bits

    @property
    def scheme(self) -> str:
        """The scheme's name, ``ptb.`` and its class's."""
        return PREFIX + type(self._scheme).__name__

    def options(self) -> dict[str, Any]:
        """Return the scheme's options as plain values."""
        return self._scheme.options()

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: ``scheme``, ``options`` and the shape of each part."""
        shapes = {name: [_dtype_name(part.dtype), list(part.shape)] for name, part in self.parts.items()}
        return {"scheme": self.scheme, "options": self.options(), "parts": shapes}

    def extra_repr(self) -> str:
        """Name the sizes and the scheme when the layer is printed."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self._scheme!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PTBLinear":
        """Move the parts along with the model, but never let them change their dtype: they are what is stored."""
        before = self.parts
        super()._apply(fn, recurse)
        for name, part in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self


def empty_parts(shapes: Any) -> dict[str, Tensor]:
    """Return uninitialized parts of the shapes that :meth:`PTBLinear.kind` tells.

    Raises:
        UserError: If ``shapes`` does not give each part a dtype and a shape.
    """
    try:
        return {
            str(name): torch.empty([int(size) for size in shape], dtype=_DTYPES[dtype])
            for name, (dtype, shape) in shapes.items()
        }
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the parts of a post-training result must each have a dtype ({', '.join(_DTYPES)}) and a shape"
        ) from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    _dtype_name(dtype): dtype
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32)
}
