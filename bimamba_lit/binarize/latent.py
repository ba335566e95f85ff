"""A linear layer that trains full-precision weights and multiplies by a weight of few bits computed from them.

The fp32 parameter is ``latent`` and ``weight`` is what the layer multiplies by. Other libraries' blocks read
``out_proj.weight`` directly instead of calling the layer; with the names this way round they get the weight of few bits
and cannot silently train in full precision.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bimamba_lit.binarize.kept import Kept
from bimamba_lit.binarize.unfinished import Unfinished
from bimamba_lit.kernels.autocast import product_dtype
from bimamba_lit.kernels.linear import FEW, linear


class LatentLinear(nn.Linear, ABC):
    """A linear layer with latent weights in fp32; the base of every trained scheme.

    Nearly every scheme is a :class:`~bimamba_lit.binarize.BinaryLinear`, one sign a weight; those of more bits are a
    :class:`~bimamba_lit.binarize.CodedLinear`. Constructor arguments after ``linear`` must be plain values kept under
    their own names: they are read back when a model is saved.

    Args:
        linear: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.

    Attributes:
        latent: ``(O, I)`` fp32 parameter that the optimizer sees.
        weight: ``(O, I)`` fp32, what the layer multiplies by, differentiable to its parameters.
        unfinished: How far the layer has come on its way to binary; None once, or where always, it is.
        formats: What ``bimamba export`` can write of the scheme; ``gguf`` looks at the terms, too.

    In evaluation mode and without gradients, the weight is kept from one token to the next until a parameter changes. A
    change in place of a parameter's ``.data`` cannot be seen; call ``eval()`` after it.
    """

    formats: ClassVar[tuple[str, ...]] = ("torchscript", "pt2", "safetensors", "gguf", "transformers")

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would register a parameter named ``weight``
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.unfinished: Unfinished | None = None
        self._kept = Kept()
        self.latent = nn.Parameter(linear.weight.detach().to(torch.float32))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32))

    @abstractmethod
    def terms(self) -> dict[str, Tensor] | None:
        """Return what multiplies and shifts the signs where the weight is one sign each, else None."""

    @abstractmethod
    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part."""

    @abstractmethod
    def _weight_in(self, dtype: torch.dtype | None) -> Tensor:
        """Return the weight, in ``dtype`` or in fp32."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer multiplies by, ``(O, I)``."""
        return self._weight_in(None)

    @staticmethod
    def finish(y: Tensor) -> Tensor:
        """Return the output ``(..., O)`` of a product with its bias: ``y``, unless a scheme does more."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``(..., I)`` by the weight and add the bias: ``(..., O)``."""
        # Reading a text costs more than forming the weight, decoding a token far less.
        decodes = not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW * self.in_features
        return self.finish(linear(x, self._kept_weight(), self.bias) if decodes else self._product(x))

    def _product(self, x: Tensor) -> Tensor:
        """Return ``x`` times the weight, formed anew, and the bias."""
        return linear(x, self._weight_in(product_dtype(x)), self.bias)

    def train(self, mode: bool = True) -> "LatentLinear":
        """Set training or evaluation mode; the weight kept while decoding is let go."""
        self._kept.clear()
        return super().train(mode)

    def _kept_weight(self) -> Tensor:
        """Return the weight, formed once for as long as nothing that it is formed of changes."""
        return self._kept.get(lambda: self.weight.detach(), self.parameters(), self.unfinished)

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments but ``linear``, as plain values."""
        names = list(inspect.signature(type(self).__init__).parameters)[2:]
        return {name: getattr(self, name) for name in names}

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: ``scheme``, the class's name, and ``options``.

        And, on its way to binary, ``unfinished``: how far it has come.
        """
        kind = {"scheme": type(self).__name__, "options": self.options()}
        return kind if self.unfinished is None else kind | {"unfinished": self.unfinished.plain()}

    def extra_repr(self) -> str:
        """Name the sizes and the options when the layer is printed."""
        options = "".join(f", {name}={value!r}" for name, value in self.options().items())
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{options}"
