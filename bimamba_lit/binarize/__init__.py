"""Binarization schemes, one a file, and making models binary.

A scheme is a subclass of :class:`BinaryLinear` built from an ``nn.Linear``.
"""

from bimamba_lit.binarize.apply import TARGETS, Scheme, binarize_, binary_layers, pack_
from bimamba_lit.binarize.describe import apply_binarization_, describe_binarization, known_schemes
from bimamba_lit.binarize.fbi import FBI
from bimamba_lit.binarize.linear import DEPLOYED_BITS, BinaryLinear, no_decay
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.scaled_sign import ScaledSign
from bimamba_lit.binarize.sign import Sign
from bimamba_lit.binarize.straight_through import StraightThrough, straight_through_sign

__all__ = [
    "DEPLOYED_BITS",
    "FBI",
    "TARGETS",
    "BinaryLinear",
    "PackedLinear",
    "ScaledSign",
    "Scheme",
    "Sign",
    "StraightThrough",
    "apply_binarization_",
    "binarize_",
    "binary_layers",
    "describe_binarization",
    "known_schemes",
    "no_decay",
    "pack_",
    "straight_through_sign",
]
