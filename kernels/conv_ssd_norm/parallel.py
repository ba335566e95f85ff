"""Convolution, SSD and gated norm of a Mamba-2 mixer, in the plain forms for devices with many cores."""

from functools import partial

from bimamba_lit.kernels.causal_conv1d.parallel import causal_conv1d
from bimamba_lit.kernels.conv_ssd_norm import naive
from bimamba_lit.kernels.rms_norm.chunked import rms_norm
from bimamba_lit.kernels.ssd.parallel import ssd

conv_ssd_norm = partial(naive.conv_ssd_norm, conv=causal_conv1d, scan=ssd, norm=rms_norm)
