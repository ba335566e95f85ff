"""Layers around a layer of a scheme that sees fewer or more weights than there are.

The scheme's layer is one like any other, so that every scheme can be had with every choice, latent and packed. Wrappers
can be around one another.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.kernels.autocast import product_dtype
from bimamba_lit.kernels.linear import linear

SchemeLayer = LatentLinear | PackedLinear | PTBLinear


class Wrapper(nn.Module, ABC):
    """A layer with another, of a scheme, inside.

    Args:
        whole: The layer that it is to be.

    Attributes:
        binary: The layer inside; packed, after :func:`bimamba_lit.binarize.pack_`.
        weight: ``(O, I)``, what the whole layer multiplies by.
        beside: What it has that a layer of its scheme has not, in words.
    """

    binary: "SchemeLayer | Wrapper"
    bias: Tensor | None

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features

    @abstractmethod
    def _whole(self, binary: Tensor) -> Tensor:
        """Return the whole weight ``(O, I)`` of that of the layer inside."""

    @abstractmethod
    def _outputs(self, x: Tensor) -> Tensor:
        """Return the outputs ``(..., O)`` of those of the layer inside."""

    @property
    @abstractmethod
    def beside(self) -> str:
        """What it has that a layer of its scheme has not, in words."""

    @abstractmethod
    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part."""

    @abstractmethod
    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: that of the layer inside, and what is around it."""

    @property
    def weight(self) -> Tensor:
        """The whole weight ``(O, I)``."""
        return self._whole(self.binary.weight)

    def _weight_in(self, dtype: torch.dtype | None) -> Tensor:
        assert isinstance(self.binary, LatentLinear | Wrapper)
        return self._whole(self.binary._weight_in(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``(..., I)`` by the weight and add the bias: ``(..., O)``."""
        if torch.is_grad_enabled() and _multiplies(innermost(self)):
            # Putting a weight together costs less than putting activations together.
            return linear(x, self._weight_in(product_dtype(x)), self.bias)
        return self._outputs(x)

    @property
    def formats(self) -> tuple[str, ...]:
        """What ``bimamba export`` can write of the scheme; ``gguf`` looks at what is around it, too."""
        return LatentLinear.formats if isinstance(self.binary, PTBLinear) else self.binary.formats

    def terms(self) -> None:
        """Return None: signs and terms are not all that the weight is made of."""


def innermost(layer: SchemeLayer | Wrapper) -> SchemeLayer:
    """Return the layer of a scheme inside of wrappers; one without a wrapper as it is."""
    while isinstance(layer, Wrapper):
        layer = layer.binary
    return layer


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a layer of a weight ``(O, I)`` and a bias ``(O,)``, which are not copied."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def _multiplies(layer: SchemeLayer) -> bool:
    """Say whether a layer is latent and does nothing but multiply by its weight."""
    return isinstance(layer, LatentLinear) and (type(layer).forward, type(layer).finish) == (
        LatentLinear.forward,
        LatentLinear.finish,
    )
