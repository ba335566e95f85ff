"""Binarization schemes, one a file, and making models binary.

A scheme is a subclass of :class:`BinaryLinear` built from an ``nn.Linear``; those that fit weights after training, from
calibration text, are in :mod:`bimamba_lit.binarize.ptb`.
"""

from bimamba_lit.binarize.apply import Scheme, binarize_, binary_layers, pack_, quantized_layers
from bimamba_lit.binarize.describe import apply_binarization_, describe_binarization, known_schemes
from bimamba_lit.binarize.fbi import FBI
from bimamba_lit.binarize.kept_rows import KeptRows
from bimamba_lit.binarize.linear import DEPLOYED_BITS, BinaryLinear, no_decay
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.retrain import Start, retrain_
from bimamba_lit.binarize.scaled_sign import ScaledSign
from bimamba_lit.binarize.sign import Sign
from bimamba_lit.binarize.straight_through import StraightThrough, straight_through_sign
from bimamba_lit.binarize.targets import TARGETS

__all__ = [
    "DEPLOYED_BITS",
    "FBI",
    "TARGETS",
    "BinaryLinear",
    "KeptRows",
    "PTBLinear",
    "PackedLinear",
    "ScaledSign",
    "Scheme",
    "Sign",
    "Start",
    "StraightThrough",
    "apply_binarization_",
    "binarize_",
    "binary_layers",
    "describe_binarization",
    "known_schemes",
    "no_decay",
    "pack_",
    "quantized_layers",
    "retrain_",
    "straight_through_sign",
]
