"""Binarization schemes, one a file, and making models binary.

A scheme is a subclass of :class:`BinaryLinear` built from an ``nn.Linear``, or, of more than one sign a weight, of
:class:`CodedLinear`; both are a :class:`LatentLinear`. Those that fit weights after training, from
calibration text, are in :mod:`bimamba_lit.binarize.ptb`.
"""

from bimamba_lit.binarize.apply import Scheme, binarize_, binary_layers, pack_, packed_form, quantized_layers
from bimamba_lit.binarize.coded import CodedLinear
from bimamba_lit.binarize.describe import apply_binarization_, describe_binarization, known_schemes, take_unfinished_
from bimamba_lit.binarize.doubled_inputs import DoubledInputs
from bimamba_lit.binarize.fbi import FBI
from bimamba_lit.binarize.formats import check_format
from bimamba_lit.binarize.group_scale import GroupScale
from bimamba_lit.binarize.kept_rows import KeptRows
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import DEPLOYED_BITS, BinaryLinear, no_decay
from bimamba_lit.binarize.one_bit import OneBit
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.pareto_q import ParetoQ
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.retrain import Start, retrain_
from bimamba_lit.binarize.scaled_sign import ScaledSign
from bimamba_lit.binarize.sign import Sign
from bimamba_lit.binarize.straight_through import StraightThrough, straight_through_sign
from bimamba_lit.binarize.targets import TARGETS
from bimamba_lit.binarize.ternary import Ternary
from bimamba_lit.binarize.two_bit import TwoBit
from bimamba_lit.binarize.two_sided import TwoSided
from bimamba_lit.binarize.unfinished import Unfinished
from bimamba_lit.binarize.wrapper import Wrapper, innermost

__all__ = [
    "DEPLOYED_BITS",
    "FBI",
    "TARGETS",
    "BinaryLinear",
    "CodedLinear",
    "DoubledInputs",
    "GroupScale",
    "KeptRows",
    "LatentLinear",
    "OneBit",
    "PTBLinear",
    "PackedLinear",
    "ParetoQ",
    "ScaledSign",
    "Scheme",
    "Sign",
    "Start",
    "StraightThrough",
    "Ternary",
    "TwoBit",
    "TwoSided",
    "Unfinished",
    "Wrapper",
    "apply_binarization_",
    "binarize_",
    "binary_layers",
    "check_format",
    "describe_binarization",
    "innermost",
    "known_schemes",
    "no_decay",
    "pack_",
    "packed_form",
    "quantized_layers",
    "retrain_",
    "straight_through_sign",
    "take_unfinished_",
]
