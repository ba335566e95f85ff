"""Binary layers with a second sign for some of their inputs.

One sign a weight fits some columns far worse than others, and bits are best spent there: BiLLM (arXiv 2402.04291,
section 3.1) binarizes what the first signs leave of its salient columns once more, after training. Here both planes are
one layer of the scheme, over all inputs and over the chosen ones again, and train together. Inputs are chosen by whole
words: 32 of them that follow one another, whose signs a kernel reads at once.
"""

from collections.abc import Callable, Mapping, Sequence
from math import lcm
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
from bimamba_lit.kernels.binary_linear.second_signs import chosen_inputs, with_doubled
from bimamba_lit.kernels.signs.naive import unpack_signs

InputShares = Mapping[str, float | Sequence[float]]

_WORD = 32


class DoubledInputs(Wrapper):
    """A binary layer whose weight is one sign for most inputs and the sum of two for the others.

    The inputs with two signs are chosen once, a word at a time, inputs 32 j to 32 j + 31: the words whose columns a
    layer of the scheme leaves the largest squared residual. Their second latent weights start at that residual, and
    count for nothing where the layer is not binary yet by ``rows`` or ``mix``
    (:class:`~bimamba_lit.binarize.Unfinished`): there the first ones are the weight.

    Args:
        whole: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.
        scheme: Makes a :class:`BinaryLinear` of an ``nn.Linear``.
        share: How many of the inputs get a second sign, above 0 up to 1; rounded to the nearest number of words, but
            one at least, and of whole groups of a scheme that has some.

    Raises:
        UserError: If ``share`` is out of range, the inputs do not fill words and groups, or the scheme is of more than
            one sign a weight.

    Attributes:
        binary: The layer of the scheme over ``I + k`` inputs; packed, after :func:`bimamba_lit.binarize.pack_`.
        bitmap: ``(ceil(I / 32 / 8),)`` uint8 buffer, what is saved of the choice: bit j % 8 of byte j // 8 is 1 if the
            inputs of word j have two signs.
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
        k = _number(first, share)
        squared = residual.square().sum(0).unflatten(0, (-1, _WORD)).sum(1)
        chosen = torch.zeros_like(squared).index_fill(0, squared.topk(k // _WORD).indices, 1)
        self.register_buffer("bitmap", ops.pack_signs(chosen[None])[0])
        self.register_buffer("doubled", chosen_inputs(self.bitmap, self.in_features, k), persistent=False)
        wide = torch.cat([weight, residual.index_select(1, self.doubled)], 1)
        self.binary = _binary(scheme, linear_of(wide, whole.bias))
        self.binary.take_second_signs_(self.doubled)

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
        signs = unpack_signs(self.bitmap, self.in_features // _WORD)
        k, number = self.binary.in_features - self.in_features, 0 if signs.is_meta else _WORD * int((signs > 0).sum())
        if not signs.is_meta and number != k:
            raise UserError(f"{name or 'the bitmap'} chooses {number} inputs, and the layer has second signs for {k}")
        self.doubled = chosen_inputs(self.bitmap, self.in_features, k)

    def check_bitmap(self, bitmap: Tensor, name: str) -> None:
        """Refuse the bitmap of a model that chose single inputs, as this project did before it chose words.

        Raises:
            UserError: If it has a bit an input and not a bit a word.
        """
        single = (-(-self.in_features // 8),)
        if bitmap.dtype == torch.uint8 and bitmap.shape == single != self.bitmap.shape:
            raise UserError(
                f"{name} chooses single inputs, as models of earlier versions do, and second signs go to whole words "
                "of 32: train the model again"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.check_bitmap(state_dict.get(f"{prefix}bitmap", self.bitmap), f"{prefix}bitmap")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_bitmap_(f"{prefix}bitmap")

    def _whole(self, binary: Tensor) -> Tensor:
        once, again = binary.split([self.in_features, len(self.doubled)], 1)
        return once.index_add(1, self.doubled, again)

    def _outputs(self, x: Tensor) -> Tensor:
        return self.binary(with_doubled(x, self.doubled))

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part: ``doubled`` is one bit a word, in whole bytes."""
        return {**self.binary.storage(), "doubled": 8 * self.bitmap.numel()}

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: that of its signs, and ``doubled_inputs``."""
        return self.binary.kind() | {"doubled_inputs": self.share}

    def extra_repr(self) -> str:
        """Name the sizes when the layer is printed."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, doubled={len(self.doubled)}"


def inputs_to_double(layers: Sequence[str], double_inputs: InputShares) -> dict[str, float]:
    """Return the share of inputs with two signs of the layers that have some, by dotted name; the last pattern counts.

    Raises:
        UserError: If a pattern matches none of the layers, or its list is empty.
    """
    chosen: dict[str, float] = {}
    for pattern, shares in double_inputs.items():
        found = matching(layers, pattern, "double_inputs")
        chosen |= zip(found, _by_depth(shares, len(found), pattern), strict=True)
    return {layer: share for layer, share in chosen.items() if share != 0}


def _by_depth(shares: float | Sequence[float], layers: int, pattern: str) -> list[float]:
    """Return the share of each layer that a pattern matches, from the first to the last."""
    if not isinstance(shares, list | tuple):
        return [shares] * layers  # type: ignore[list-item]
    if not shares:
        raise UserError(f"double_inputs: '{pattern}' has an empty list; give it one share, or some from first to last")
    return [shares[layer * len(shares) // layers] for layer in range(layers)]


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
    inputs, unit = layer.in_features, lcm(_WORD, layer.options().get("group_size") or 1)
    if inputs % unit:
        raise UserError(
            f"double_inputs: second signs go to {unit} inputs at a time, whole words and groups, so a layer must have "
            f"a multiple of {unit} inputs, and {inputs} is none"
        )
    return max(round(share * inputs / unit), 1) * unit
