"""How many weights a model has, how many of them are binary, and what it takes to store them.

A size is that of the deployed model: a sign is one bit (rows padded to whole bytes), and everything left in full
precision, the scales of binary layers included, is counted at 16 bits, the width it is deployed in, whatever the
width it is trained in. Tied weights count once.
"""

from typing import NamedTuple

from torch import Tensor, nn

from bimamba_lit.binarize import DEPLOYED_BITS, binary_layers


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
    return ParameterCount(binarized + scales + _full_precision(lm), binarized)


def true_bits(lm: nn.Module) -> int:
    """Return the bits it takes to store a model: signs, scales, and everything else at 16 bits."""
    binary = sum(sum(layer.storage().values()) for _, layer in binary_layers(lm))
    return binary + DEPLOYED_BITS * _full_precision(lm)


def _full_precision(lm: nn.Module) -> int:
    """Count the parameters outside binary layers, tied ones once; packed layers have none, only buffers."""
    inside = {id(parameter) for _, layer in binary_layers(lm) for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in lm.parameters() if id(parameter) not in inside)
