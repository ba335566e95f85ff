"""A binary layer as ``Q1_0``, llama.cpp's 1-bit type: 128 signs of a row and one fp16 scale.

The type has no shift and no scale by input. A scale by input is exact all the same where a norm comes right before the
layer, whose gain takes it (``y = s (a . (g . n)) = s ((a . g) . n)``), and where it is the same for all 128 inputs of a
block. Legend: O out features, I in features, K blocks of 128 inputs.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bimamba_lit.binarize import BinaryLinear, PackedLinear, PTBLinear, Wrapper
from bimamba_lit.binarize.apply import QuantizedLinear
from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import rounded

BLOCK = 128


class Fit(NamedTuple):
    """A layer that fits.

    Attributes:
        scale: (O, K) fp32, the scale of every block.
        gain: (I,) what the norm before the layer is multiplied by, or None.
    """

    scale: Tensor
    gain: Tensor | None


def fit(layer: QuantizedLinear, after_norm: bool) -> Fit | str:
    """Return a layer's scales as Q1_0 holds them, or what keeps it from that type.

    Args:
        layer: The layer.
        after_norm: Whether a norm with a gain is all that comes before it.
    """
    held = layer.terms()
    if isinstance(layer, Wrapper):
        return f"it has {layer.beside}, and a tensor has one type and its sizes"
    if held is None:
        return "it holds more than one sign a weight"
    if not isinstance(layer, PTBLinear) and "gguf" not in layer.formats:
        return f"its scheme says that it fits {', '.join(layer.formats) or 'no format'}"
    if isinstance(layer, BinaryLinear) and layer.unfinished is not None:
        return "it is not binary yet"
    terms = {name: term.detach() for name, term in held.items()}
    blocks, rest = divmod(layer.in_features, BLOCK)
    if rest:
        return f"it has {layer.in_features} inputs, not a multiple of {BLOCK}"
    for name in ("in_shift", "out_shift"):
        if name in terms and terms[name].any():
            return f"it has a shift that is not zero ({name})"
    if layer.bias is not None and layer.bias.any():
        return "it has a bias"
    scale = torch.ones(layer.out_features, blocks)
    if "group_scale" in terms:
        groups = terms["group_scale"].shape[1]
        if blocks % groups:
            return f"it has one scale for {layer.in_features // groups} inputs, not for a multiple of {BLOCK}"
        scale = scale * terms["group_scale"].float().repeat_interleave(blocks // groups, dim=1)
    if "out_scale" in terms:
        scale = scale * terms["out_scale"].float().reshape(-1, 1)
    if "in_scale" not in terms:
        return Fit(scale, None)
    gain = terms["in_scale"].float().expand(layer.in_features)
    if after_norm:
        return Fit(scale, gain)
    by_block = gain.unflatten(0, (blocks, BLOCK))
    if (by_block != by_block[:, :1]).any():
        return "it has a scale by input and no norm right before it"
    return Fit(scale * by_block[:, 0], None)


def as_blocks(name: str, layer: QuantizedLinear, scale: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a layer, (O, 18 K): the scale of a block, fp16, before its signs, as `pack_signs` lays them.

    Raises:
        UserError: If a scale is outside the range of fp16.
    """
    assert isinstance(layer, BinaryLinear | PackedLinear | PTBLinear)
    signs = layer.signs if isinstance(layer, PackedLinear) else layer.packed_signs()
    half = rounded(scale, torch.float16, f"the scale of {name}")
    if (half == 0).logical_and(scale != 0).any():
        raise UserError(f"a scale of {name} is too small for float16, in which Q1_0 stores it")
    parts = [half.contiguous().view(torch.uint8).unflatten(1, (-1, 2)), signs.unflatten(1, (-1, BLOCK // 8))]
    return torch.cat(parts, dim=2).flatten(1).cpu().numpy()
