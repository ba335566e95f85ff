"""Post-training binarization: schemes that fit one layer's weight to its calibration inputs, without training.

Every scheme is a :class:`PTBScheme`: plain options, ``fit(weight, hessian)`` for one layer, and ``decode`` for what was
stored. ``hessian`` is that of the layer's squared output error, ``(2 / N) X^T X`` over N calibration inputs X.
:func:`calibrate_` does a whole model.
"""

from bimamba_lit.binarize.ptb.arb import ARB
from bimamba_lit.binarize.ptb.arb_rc import ARBRC
from bimamba_lit.binarize.ptb.arb_x import ARBX
from bimamba_lit.binarize.ptb.billm import BiLLM
from bimamba_lit.binarize.ptb.calibrate import calibrate_
from bimamba_lit.binarize.ptb.gptq import GPTQ
from bimamba_lit.binarize.ptb.hessian import proxy_error
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.ptb.pbllm import PBLLM
from bimamba_lit.binarize.ptb.result import PTBResult
from bimamba_lit.binarize.ptb.scaled_sign import ScaledSign
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.ptb.sign import Sign
from bimamba_lit.binarize.ptb.ternary import Ternary
from bimamba_lit.binarize.ptb.two_bit import TwoBit

__all__ = [
    "ARB",
    "ARBRC",
    "ARBX",
    "BiLLM",
    "GPTQ",
    "PTBLinear",
    "PBLLM",
    "PTBResult",
    "PTBScheme",
    "ScaledSign",
    "Sign",
    "Ternary",
    "TwoBit",
    "calibrate_",
    "proxy_error",
]
