"""Binary layers with a second sign for some of their inputs.

One sign a weight fits some columns far worse than others, and bits are best spent there: BiLLM (arXiv 2402.04291,
section 3.1) binarizes what the first signs leave of its salient columns once more, after training. Here both planes are
one layer of the scheme, over all inputs and over the chosen ones again, and train together.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, lcm
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.targets import matching
from bimamba_lit.binarize.wrapper import Wrapper, linear_of
from bimamba_lit.errors import UserError
from bimamba_lit.kernels.signs.naive import unpack_signs

_BYTE = 8


class DoubledInputs(Wrapper):
    """A binary layer whose weight is one sign for most inputs and the sum of two for the others.

    The inputs with two signs are chosen once: those whose columns a layer of the scheme leaves the largest squared
    residual. Their second latent weights start at that residual, and count for nothing where the layer is not binary
    yet by ``rows`` or ``mix`` (:class:`~bimamba_lit.binarize.Unfinished`): there the first ones are the weight.

    Args:
        whole: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.
        scheme: Makes a :class:`BinaryLinear` of an ``nn.Linear``.
        share: How many of the inputs get a second sign, above 0 up to 1; rounded so that signs fill whole bytes and
            whole groups of a scheme that has some.

    Raises:
        UserError: If ``share`` is out of range, no number of inputs fills bytes and groups, or the scheme is of more
            than one sign a weight.

    Attributes:
        binary: The layer of the scheme over ``I + k`` inputs; packed, after :func:`bimamba_lit.binarize.pack_`.
        bitmap: ``(ceil(I / 8),)`` uint8 buffer, what is saved of the choice: bit i % 8 of byte i // 8 is 1 if input i
            has two signs.
        doubled: ``(k,)`` int64, these inputs, rising; see :meth:`read_bitmap_`.
        weight: ``(O, I)``, what the layer multiplies by.
    """

    binary: BinaryLinear | PackedLinear
    bitmap: Tensor
    doubled: Tensor

    def __init__(self, whole: nn.Linear, scheme: Callable[[nn.Linear], LatentLinear | PTBLinear], share: float) -> None:
        super().__init__(whole)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise UserError(f"double_inputs: the share must be a number above 0 up to 1, not {share!r}")
        self.share = share
        weight = whole.weight.detach().to(torch.float32)
        first = _binary(scheme, linear_of(weight))
        with torch.no_grad():
            residual = weight - first.weight
        worst = residual.square().sum(0).topk(_number(first, share)).indices
        chosen = torch.zeros_like(weight[0]).index_fill(0, worst, 1)
        self.register_buffer("bitmap", ops.pack_signs(chosen[None])[0])
        self.register_buffer("doubled", worst.sort().values, persistent=False)
        wide = torch.cat([weight, residual.index_select(1, self.doubled)], 1)
        self.binary = _binary(scheme, linear_of(wide, whole.bias))
        self.binary.second_signs = len(self.doubled)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias ``(O,)``, that of the layer inside."""
        return self.binary.bias

    @property
    def beside(self) -> str:
        """What it has that a layer of its scheme has not."""
        return f"a second sign for {len(self.doubled)} of its inputs"

    def read_bitmap_(self, name: str = "") -> None:
        """Set ``doubled`` to what the bitmap says; to be called wherever the bitmap was changed.

        Args:
            name: The bitmap's own, for the error.

        Raises:
            UserError: If it does not choose as many inputs as there are second signs.
        """
        signs = unpack_signs(self.bitmap, self.in_features)
        k, number = self.binary.in_features - self.in_features, 0 if signs.is_meta else int((signs > 0).sum())
        if not signs.is_meta and number != k:
            raise UserError(f"{name or 'the bitmap'} chooses {number} inputs, and the layer has second signs for {k}")
        self.doubled = chosen_inputs(self.bitmap, self.in_features, k)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_bitmap_(f"{prefix}bitmap")

    def _whole(self, binary: Tensor) -> Tensor:
        once, again = binary.split([self.in_features, len(self.doubled)], 1)
        return once.index_add(1, self.doubled, again)

    def _outputs(self, x: Tensor) -> Tensor:
        return self.binary(with_doubled(x, self.doubled))

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part: ``doubled`` is one bit an input, in whole bytes."""
        return {**self.binary.storage(), "doubled": _BYTE * ceil(self.in_features / _BYTE)}

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: that of its signs, and ``doubled_inputs``."""
        return self.binary.kind() | {"doubled_inputs": self.share}

    def extra_repr(self) -> str:
        """Name the sizes when the layer is printed."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, doubled={len(self.doubled)}"


def with_doubled(x: Tensor, doubled: Tensor) -> Tensor:
    """Put the doubled inputs behind ``x`` ``(..., I)``: ``(..., I + k)``."""
    return torch.cat([x, x.index_select(-1, doubled)], -1)


def chosen_inputs(bitmap: Tensor, inputs: int, k: int) -> Tensor:
    """Return the ``k`` inputs, rising, whose bits are 1 in a bitmap of ``inputs``: int64."""
    return unpack_signs(bitmap, inputs, torch.int8).sort(stable=True, descending=True).indices[:k]


def inputs_to_double(layers: Sequence[str], double_inputs: Mapping[str, float]) -> dict[str, float]:
    """Return the share of inputs with two signs of the layers that have some, by dotted name; the last pattern counts.

    Raises:
        UserError: If a pattern matches none of the layers.
    """
    return {
        layer: share for pattern, share in double_inputs.items() for layer in matching(layers, pattern, "double_inputs")
    }


def _binary(scheme: Callable[[nn.Linear], LatentLinear | PTBLinear], linear: nn.Linear) -> BinaryLinear:
    layer = scheme(linear)
    if not isinstance(layer, BinaryLinear):
        kind = type(layer).__name__
        raise UserError(
            f"double_inputs: a {kind} is not trained with one sign a weight, so none of its inputs can have a second: "
            "set double_inputs to {}"
        )
    return layer


def _number(layer: BinaryLinear, share: float) -> int:
    inputs = layer.in_features
    unit = lcm(_BYTE, layer.options().get("group_size") or 1)
    fewest, most = inputs // unit + 1, 2 * inputs // unit
    if fewest > most:
        raise UserError(
            f"double_inputs: no part of {inputs} inputs beside them makes a multiple of {unit}, which whole bytes and "
            "groups take"
        )
    return min(max(round(inputs * (1 + share) / unit), fewest), most) * unit - inputs
