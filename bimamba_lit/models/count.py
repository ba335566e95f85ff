"""How many weights a model has, how many of them are binary, and what it takes to store them.

A size is that of the deployed model: a sign is one bit (rows padded to whole bytes), a post-training result the bytes
of its parts, an entry of a quantized embedding has its own bits, and everything left in full precision, the scales of
trained binary layers included, is counted at 16 bits, the width it is deployed in, whatever the width it is trained in.
Tied weights count once.
"""

from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from bimamba_lit.binarize import DEPLOYED_BITS, CodedLinear, PTBLinear, innermost, quantized_layers
from bimamba_lit.binarize.apply import QuantizedLinear
from bimamba_lit.models.quantized_table import QuantizedTable

FULL_PRECISION = "full_precision"


class ParameterCount(NamedTuple):
    """Numbers of weights.

    Attributes:
        total: All weights, scales of binary layers included.
        binarized: Those in binary layers, rows in full precision included, or in layers of a few bits fitted after
            training.
    """

    total: int
    binarized: int


def count_parameters(lm: nn.Module) -> ParameterCount:
    """Count the weights of a model; a packed model has as many as the one it was packed from."""
    binarized = beside = 0
    for _, layer in quantized_layers(lm):
        binarized += layer.in_features * layer.out_features
        beside += sum(values.numel() for values in _beside_signs(layer).values() if values.is_floating_point())
        beside += 0 if layer.bias is None else layer.bias.numel()
    beside += sum(table.codes.shape[0] * table.width + table.scale.numel() for table in _tables(lm))
    return ParameterCount(binarized + beside + _full_precision(lm), binarized)


def _beside_signs(layer: QuantizedLinear) -> dict[str, Tensor]:
    held = innermost(layer)
    if isinstance(held, CodedLinear):
        return held.empty_parts
    return held.parts if isinstance(held, PTBLinear) else held.terms() or {}


def storage_by_part(lm: nn.Module) -> dict[str, int]:
    """Return the bits it takes to store a model by part: of its binary layers and quantized tables, and the rest."""
    bits: Counter[str] = Counter()
    for layer in [*(layer for _, layer in quantized_layers(lm)), *_tables(lm)]:
        bits.update(layer.storage())
    return dict(bits) | {FULL_PRECISION: DEPLOYED_BITS * _full_precision(lm)}


def true_bits(lm: nn.Module) -> int:
    """Return the bits it takes to store a model: signs, scales, quantized tables, and everything else at 16 bits."""
    return sum(storage_by_part(lm).values())


def _tables(lm: nn.Module) -> list[QuantizedTable]:
    return [module for module in lm.modules() if isinstance(module, QuantizedTable)]


def _full_precision(lm: nn.Module) -> int:
    """Count the parameters outside binary layers, tied ones once; packed layers and tables have none."""
    inside = {id(parameter) for _, layer in quantized_layers(lm) for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in lm.parameters() if id(parameter) not in inside)
