"""A linear layer whose weight is binary.

The fp32 parameter is ``latent`` and ``weight`` is what the layer multiplies by. Other libraries' blocks read
``out_proj.weight`` directly instead of calling the layer; with the names this way round they get the binary weight and
cannot silently train in full precision.

Every scheme is one formula with some of its terms, so that training, packing and every kernel share one definition:
``weight[o,i] = out_scale[o] * group_scale[o,g(i)] * sign[o,i] * in_scale[i] + out_shift[o] + in_shift[i]``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.straight_through import StraightThrough
from bimamba_lit.errors import UserError
from bimamba_lit.kernels.binary_weight import naive
from bimamba_lit.kernels.linear import FEW, linear

TERMS = ("in_scale", "out_scale", "group_scale", "in_shift", "out_shift")
DEPLOYED_BITS = 16
"""Bits of a scale, a shift or a bias once deployed (fp16 or bf16): what storage counts, as the paper's table does."""


class BinaryLinear(nn.Linear, ABC):
    """A linear layer with latent weights in fp32 and a binary weight computed from them; the base of every scheme.

    A scheme subclasses this, adds its learnable scales in ``__init__`` (each marked with :func:`no_decay`), and
    returns them from :meth:`terms`. Constructor arguments after ``linear`` must be plain values kept under their own
    names: they are read back when a model is saved.

    Args:
        linear: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.
        straight_through: The gradient that stands in for that of the sign.

    Attributes:
        latent: ``(O, I)`` fp32 parameter that the optimizer sees.
        weight: ``(O, I)`` fp32 binary weight, differentiable to ``latent`` and to the scales.
        formats: What ``bimamba export`` can write of the scheme. All that :meth:`terms` can say fits every format, but
            ``gguf``, which looks at the terms themselves; a scheme whose layer does more than its terms names fewer.
    """

    formats: ClassVar[tuple[str, ...]] = ("torchscript", "pt2", "safetensors", "gguf", "transformers")

    def __init__(self, linear: nn.Linear, straight_through: StraightThrough = "identity") -> None:
        if straight_through not in get_args(StraightThrough):
            known = ", ".join(get_args(StraightThrough))
            raise UserError(f"straight_through is {straight_through!r}, and must be one of {known}")
        nn.Module.__init__(self)  # nn.Linear's would register a parameter named ``weight``
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.straight_through = straight_through
        self._kept: tuple[Any, Tensor] | None = None
        self.latent = nn.Parameter(linear.weight.detach().to(torch.float32))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32))

    @abstractmethod
    def terms(self) -> dict[str, Tensor]:
        """Return the terms of the formula that this scheme uses, differentiable.

        Keys are among ``in_scale`` ``(I,)``, ``out_scale`` ``(O,)``, ``group_scale`` ``(O, G)``, ``in_shift`` ``(I,)``
        and ``out_shift`` ``(O,)``; a vector may also have one element that serves all.
        """

    def centred(self) -> Tensor:
        """Return what the sign is taken of, ``(O, I)``: the latent weights, unless a scheme shifts them first."""
        return self.latent

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The binary weight ``(O, I)``."""
        return self.weight_in(None)

    def weight_in(self, dtype: torch.dtype | None) -> Tensor:
        """Return the binary weight ``(O, I)`` in ``dtype``, formed in one step; None for that of its parameters."""
        terms: dict[str, Any] = {**self.terms()}
        return ops.binary_weight(self.centred(), self.straight_through, dtype=dtype, **terms)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``(..., I)`` by the binary weight and add the bias: ``(..., O)``."""
        # Reading a text costs more than forming the weight, decoding a token far less.
        decodes = not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW * self.in_features
        return linear(x, self._kept_weight() if decodes else self.weight_in(product_dtype(x)), self.bias)

    def train(self, mode: bool = True) -> "BinaryLinear":
        """Set training or evaluation mode; the weight kept while decoding is let go."""
        self._kept = None
        return super().train(mode)

    def _kept_weight(self) -> Tensor:
        """Return the binary weight, formed once for as long as nothing that it is formed of changes."""
        state = fingerprint(self.parameters())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.weight.detach())
        return self._kept[1]

    def packed_signs(self) -> Tensor:
        """Return the signs as bits, ``(O, ceil(I / 8))`` uint8, as :func:`bimamba_lit.ops.pack_signs` lays them."""
        return ops.pack_signs(self.centred().detach())

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part: signs in whole bytes a row, the rest in 16 bits."""
        return storage(self)

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments but ``linear``, as plain values."""
        names = list(inspect.signature(type(self).__init__).parameters)[2:]
        return {name: getattr(self, name) for name in names}

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: ``scheme``, the class's name, and ``options``."""
        return {"scheme": type(self).__name__, "options": self.options()}

    def extra_repr(self) -> str:
        """Name the sizes and the options when the layer is printed."""
        options = "".join(f", {name}={value!r}" for name, value in self.options().items())
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{options}"


def fingerprint(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return what changes whenever the values of one of the tensors do, without reading them."""
    return tuple((id(t), t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast multiplies ``x`` in; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def no_decay(values: Tensor) -> nn.Parameter:
    """Return ``values`` as a fp32 parameter that weight decay leaves alone (Mamba's ``_no_weight_decay`` mark)."""
    parameter = nn.Parameter(values.detach().to(torch.float32).clone())
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def compose(signs: Tensor, terms: dict[str, Tensor]) -> Tensor:
    """Return the dense weight ``(O, I)`` that signs ``(O, I)`` and the terms of the formula stand for."""
    return naive.compose(signs, **terms)


def storage(layer: Any) -> dict[str, int]:
    """Return the deployed bits of a latent or packed binary layer by part; see :meth:`BinaryLinear.storage`."""
    bits = {"signs": 8 * layer.out_features * -(-layer.in_features // 8)}
    bits |= {name: DEPLOYED_BITS * term.numel() for name, term in layer.terms().items()}
    if layer.bias is not None:
        bits["bias"] = DEPLOYED_BITS * layer.bias.numel()
    return bits
