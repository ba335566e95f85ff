"""A linear layer whose weight is binary.

Every scheme is one formula with some of its terms, so that training, packing and every kernel share one definition:
``weight[o,i] = out_scale[o] * group_scale[o,g(i)] * sign[o,i] * in_scale[i] + out_shift[o] + in_shift[i]``.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.scaled_gradient import scaled_gradient
from bimamba_lit.binarize.straight_through import StraightThrough, check_straight_through
from bimamba_lit.binarize.unfinished import row_scale
from bimamba_lit.errors import UserError
from bimamba_lit.kernels.binary_linear.second_signs import whole_shift
from bimamba_lit.kernels.binary_weight import naive

TERMS = ("in_scale", "out_scale", "group_scale", "in_shift", "out_shift")
DEPLOYED_BITS = 16
"""Bits of a scale, a shift or a bias once deployed (fp16 or bf16): what storage counts, as the paper's table does."""


class BinaryLinear(LatentLinear):
    """A linear layer with latent weights in fp32 and a binary weight computed from them: one sign each.

    A scheme subclasses this, adds its learnable scales in ``__init__`` (each marked with :func:`no_decay`), and
    returns them from :meth:`terms`. Constructor arguments after ``linear`` must be plain values kept under their own
    names: they are read back when a model is saved.

    Args:
        linear: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.
        straight_through: The gradient that stands in for that of the sign.
        scaled_gradients: Multiply the gradient of each scale by 1 / sqrt(weights that it serves), as in learned step
            size quantization (LSQ, arXiv 1902.08153, section 2.2): scales then weigh in the gradient's norm, which
            clipping goes by, as single latent weights do. AdamW's own step is the same either way.
        reach: How far from zero the gradients ``clipped``, ``tanh`` and ``bireal`` reach, in units of the mean
            abs(latent) of each weight's row (of what the sign is taken of, where a scheme shifts it); ``null`` is the
            papers' 1, whatever the size of the weights. All four are divided by it, as derivatives to the latent weight
            are, so that a binary layer's gradients are as large as a full-precision layer's.

    Attributes:
        latent: ``(O, I)`` fp32 parameter that the optimizer sees.
        weight: ``(O, I)`` fp32 binary weight, differentiable to ``latent`` and to the scales.
        widening: ``reach`` is multiplied by it; 1 unless a callback anneals the gradient.
        unfinished: How far the layer has come on its way to binary; None once, or where always, it is.
        second_signs: How many of its last inputs are others once more, for their second signs; see
            :meth:`take_second_signs_` and :class:`~bimamba_lit.binarize.doubled_inputs.DoubledInputs`.
        formats: What ``bimamba export`` can write of the scheme. All that :meth:`terms` can say fits every format, but
            ``gguf``, which looks at the terms themselves; a scheme whose layer does more than its terms names fewer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        straight_through: StraightThrough = "identity",
        scaled_gradients: bool = False,
        reach: float | None = None,
    ) -> None:
        check_straight_through(straight_through)
        if reach is not None and not reach > 0:
            raise UserError(f"reach is {reach}, and must be above 0 or null")
        super().__init__(linear)
        self.straight_through = straight_through
        self.scaled_gradients = scaled_gradients
        self.reach = reach
        self.widening = 1.0
        self.second_signs = 0

    @abstractmethod
    def terms(self) -> dict[str, Tensor]:
        """Return the terms of the formula that this scheme uses, differentiable.

        Keys are among ``in_scale`` ``(I,)``, ``out_scale`` ``(O,)``, ``group_scale`` ``(O, G)``, ``in_shift`` ``(I,)``
        and ``out_shift`` ``(O,)``; a vector may also have one element that serves all, and ``in_shift`` be that of the
        first inputs alone.
        """

    def take_second_signs_(self, inputs: Tensor) -> None:
        """Take the last inputs for second signs of the first ones, in place.

        Args:
            inputs: ``(k,)`` int64, the inputs that the last k are once more.
        """
        self.second_signs = len(inputs)

    def centred(self) -> Tensor:
        """Return what the sign is taken of, ``(O, I)``: the latent weights, unless a scheme shifts them first."""
        return self.latent

    def served(self, scale: Tensor) -> int:
        """Return how many weights an element of ``scale`` multiplies; ``scaled_gradients`` goes by it."""
        return self.latent.numel() // scale.numel()

    def _product(self, x: Tensor) -> Tensor:
        if self.unfinished is not None:
            return super()._product(x)
        centred = self.centred()
        reach, terms = self._reach_of(centred), self._trained_terms()
        return ops.latent_linear(x, centred, self.straight_through, bias=self.bias, reach=reach, **terms)

    def _trained_terms(self) -> dict[str, Any]:
        """Return the terms of the formula with the gradients that they train by."""
        terms: dict[str, Any] = whole_terms(self)
        if self.scaled_gradients:
            terms |= {
                name: scaled_gradient(term, self.served(term) ** -0.5)
                for name, term in terms.items()
                if "scale" in name
            }
        return terms

    def _weight_in(self, dtype: torch.dtype | None) -> Tensor:
        terms, centred = self._trained_terms(), self.centred()

        def binary(dtype: torch.dtype | None = None) -> Tensor:
            reach = self._reach_of(centred)
            return ops.binary_weight(centred, self.straight_through, dtype=dtype, reach=reach, **terms)

        if self.unfinished is None:
            return binary(dtype)
        weight = self.unfinished.weight(self._dense(), centred, binary, terms)
        return weight.to(dtype or weight.dtype)

    def _dense(self) -> Tensor:
        """Return the weight ``(O, I)`` that the layer has before it is binary."""
        if not self.second_signs:
            return self.latent
        return nn.functional.pad(self.latent[:, : -self.second_signs], (0, self.second_signs))

    def _reach_of(self, centred: Tensor) -> Tensor | None:
        if self.reach is None or not torch.is_grad_enabled():
            return None
        return self.widening * self.reach * row_scale(centred).squeeze(1)

    def packed_signs(self) -> Tensor:
        """Return the signs as bits, ``(O, ceil(I / 8))`` uint8, as :func:`bimamba_lit.ops.pack_signs` lays them.

        Raises:
            UserError: If the layer is not binary yet.
        """
        if self.unfinished is not None:
            raise UserError(
                f"the model is not binary yet ({self.unfinished.way}, {self.unfinished.share:.0%} of the way), and its "
                "signs alone would compute something else; train it to the end of its schedule first"
            )
        return ops.pack_signs(self.centred().detach())

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part: signs in whole bytes a row, the rest in 16 bits.

        A layer that is not binary yet needs 16 bits a weight.
        """
        if self.unfinished is None:
            return storage(self)
        bias = 0 if self.bias is None else self.bias.numel()
        return {"unfinished": DEPLOYED_BITS * (self.latent.numel() + bias)}


def no_decay(values: Tensor) -> nn.Parameter:
    """Return ``values`` as a fp32 parameter that weight decay leaves alone (Mamba's ``_no_weight_decay`` mark)."""
    parameter = nn.Parameter(values.detach().to(torch.float32).clone())
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def compose(signs: Tensor, terms: dict[str, Tensor]) -> Tensor:
    """Return the dense weight ``(O, I)`` that signs ``(O, I)`` and the terms of the formula stand for."""
    return naive.compose(signs, **terms)


def whole_terms(layer: Any) -> dict[str, Tensor]:
    """Return the terms of a latent or packed binary layer for all of its inputs, as the formula takes them."""
    terms = {**layer.terms()}
    if "in_shift" in terms:
        terms["in_shift"] = whole_shift(terms["in_shift"], layer.in_features)
    return terms


def storage(layer: Any) -> dict[str, int]:
    """Return the deployed bits of a latent or packed binary layer by part; see :meth:`BinaryLinear.storage`."""
    bits = {"signs": 8 * layer.out_features * -(-layer.in_features // 8)}
    bits |= {name: DEPLOYED_BITS * term.numel() for name, term in layer.terms().items()}
    if layer.bias is not None:
        bits["bias"] = DEPLOYED_BITS * layer.bias.numel()
    return bits
