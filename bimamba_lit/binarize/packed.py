"""The packed form of a binary layer: signs as bits and the scales, no latent weights."""

from typing import Any

from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.linear import TERMS, BinaryLinear, compose, storage, whole_terms
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.errors import UserError


class PackedLinear(nn.Module):
    """A binary layer for inference: same outputs as the layer it was packed from, a thirty-second of its weights.

    Args:
        layer: The trained layer, or a post-training result of one sign a weight. Its scheme and options are kept for
            the record.
        activation_bits: 8 rounds what the signs are multiplied by to 8 bits a token, which is faster on a GPU; see
            :func:`bimamba_lit.ops.binary_linear`. It is a choice of who runs the model, and not saved with it.

    Raises:
        UserError: If a post-training result holds more than one sign a weight.

    Attributes:
        formats: What can hold the layer, as its scheme says.
        activation_bits: As given; may be changed at any time.
        signs: ``(O, ceil(I / 8))`` uint8 buffer, laid as by :func:`bimamba_lit.ops.pack_signs`.
        weight: ``(O, I)`` fp32, unpacked on every access, for blocks that read it directly.
    """

    signs: Tensor
    bias: Tensor | None

    def __init__(self, layer: BinaryLinear | PTBLinear, activation_bits: int | None = None) -> None:
        super().__init__()
        self.activation_bits = activation_bits
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self._kind = layer.kind()
        self.formats = layer.formats if isinstance(layer, BinaryLinear) else BinaryLinear.formats
        self._finish = layer.finish if isinstance(layer, BinaryLinear) else BinaryLinear.finish
        terms = layer.terms()
        if terms is None:
            raise UserError(
                f"a result of {layer.kind()['scheme']} with the options {layer.options()} holds more than one sign a "
                "weight: it runs as it is and cannot be packed"
            )
        self.register_buffer("signs", layer.packed_signs())
        for name, term in terms.items():
            self.register_buffer(name, term.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def terms(self) -> dict[str, Tensor]:
        """Return the terms of the formula that this layer holds; see :meth:`BinaryLinear.terms`."""
        return {name: self._buffers[name] for name in TERMS if self._buffers.get(name) is not None}  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """The binary weight ``(O, I)``, dense."""
        return compose(ops.unpack_signs(self.signs, self.in_features), whole_terms(self))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``(..., I)`` by the binary weight: ``(..., O)``."""
        terms: dict[str, Any] = whole_terms(self)
        y = ops.binary_linear(
            x, self.signs, self.in_features, bias=self.bias, activation_bits=self.activation_bits, **terms
        )
        return self._finish(y)

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part; equal to those of the layer it came from."""
        return storage(self)

    @property
    def scheme(self) -> str:
        """The name of the scheme that made this layer."""
        return str(self._kind["scheme"])

    def options(self) -> dict[str, Any]:
        """Return the options of the scheme that made this layer."""
        return dict(self._kind["options"])

    def kind(self) -> dict[str, Any]:
        """Return what describes the layer that this one was packed from."""
        return dict(self._kind)

    def extra_repr(self) -> str:
        """Name the sizes and the scheme when the layer is printed."""
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}"
