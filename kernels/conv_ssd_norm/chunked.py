"""Convolution, SSD and gated norm of a Mamba-2 mixer, in the forms for a CPU."""

from functools import partial

from bimamba_lit.kernels.causal_conv1d.chunked import causal_conv1d
from bimamba_lit.kernels.conv_ssd_norm import naive
from bimamba_lit.kernels.rms_norm.chunked import rms_norm
from bimamba_lit.kernels.ssd.chunked import ssd

conv_ssd_norm = partial(naive.conv_ssd_norm, conv=causal_conv1d, scan=ssd, norm=rms_norm)
