"""How many weights a model has, how many of them are binary, and what it takes to store them.

A size is that of the deployed model: a sign is one bit (rows padded to whole bytes), an entry of a quantized embedding
has its own bits, and everything left in full precision, all scales included, is counted at 16 bits, the width it is
deployed in, whatever the width it is trained in. Tied weights count once.
"""

from typing import NamedTuple

from torch import Tensor, nn

from bimamba_lit.binarize import DEPLOYED_BITS, binary_layers
from bimamba_lit.models.quantized_table import QuantizedTable


class ParameterCount(NamedTuple):
    """Numbers of weights.

    Attributes:
        total: All weights, scales of binary layers included.
        binarized: Those stored as one sign each.
    """

    total: int
    binarized: int


def count_parameters(lm: nn.Module) -> ParameterCount:
    """Count the weights of a model; a packed model has as many as the one it was packed from."""
    binarized = scales = 0
    for _, layer in binary_layers(lm):
        binarized += layer.in_features * layer.out_features
        scales += sum(term.numel() for term in layer.terms().values())
        scales += layer.bias.numel() if isinstance(layer.bias, Tensor) else 0
    tables = sum(table.codes.shape[0] * table.width + table.scale.numel() for table in _tables(lm))
    return ParameterCount(binarized + scales + tables + _full_precision(lm), binarized)


def true_bits(lm: nn.Module) -> int:
    """Return the bits it takes to store a model: signs, scales, quantized tables, and everything else at 16 bits."""
    parts = [layer.storage() for _, layer in binary_layers(lm)] + [table.storage() for table in _tables(lm)]
    return sum(sum(part.values()) for part in parts) + DEPLOYED_BITS * _full_precision(lm)


def _tables(lm: nn.Module) -> list[QuantizedTable]:
    return [module for module in lm.modules() if isinstance(module, QuantizedTable)]


def _full_precision(lm: nn.Module) -> int:
    """Count the parameters outside binary layers, tied ones once; packed layers and tables have none."""
    inside = {id(parameter) for _, layer in binary_layers(lm) for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in lm.parameters() if id(parameter) not in inside)
