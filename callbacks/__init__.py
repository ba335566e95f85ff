"""Lightning callbacks that watch the training of 1-bit models, and those that lead it over its steps."""

from bimamba_lit.callbacks.annealed_gradient import AnnealedGradient
from bimamba_lit.callbacks.bit_flips import BitFlips
from bimamba_lit.callbacks.loss_spikes import LossSpikeGuard
from bimamba_lit.callbacks.nonfinite import NonFiniteGuard
from bimamba_lit.callbacks.progress_lines import ProgressLines
from bimamba_lit.callbacks.progressive import Progressive
from bimamba_lit.callbacks.random_state import RandomState
from bimamba_lit.callbacks.samples import Samples
from bimamba_lit.callbacks.steps_bar import StepsBar
from bimamba_lit.callbacks.throughput import Throughput
from bimamba_lit.callbacks.weight_scales import WeightScales

__all__ = [
    "AnnealedGradient",
    "BitFlips",
    "LossSpikeGuard",
    "NonFiniteGuard",
    "ProgressLines",
    "Progressive",
    "RandomState",
    "Samples",
    "StepsBar",
    "Throughput",
    "WeightScales",
]
