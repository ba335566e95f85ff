"""The public ops, one family a file: each checks its inputs, so kernels can trust them, and takes a backend.

Every op has a definition, ``kernels/OP/naive.py``; most have a fast form in plain PyTorch, ``kernels/OP/chunked.py``;
some have a Triton form, ``kernels/OP/triton.py``, which is imported only when it is used. ``backend="auto"`` takes
Triton for CUDA tensors where the op has it, else the chunked form, else the naive one; where an op has no chunked form,
``"chunked"`` is ``"naive"``. Off the CPU an op's ``kernels/OP/parallel.py``, where there is one, stands for the chunked
form: large batched operations instead of tiles that fit a cache.

A file may bear the name of its op; from here the name is the op.
"""

from bimamba_lit.kernels.packed_blocks.naive import BlockParameters, Packed
from bimamba_lit.ops.arguments import DIVERGENCES
from bimamba_lit.ops.backends import BACKENDS, as_on_gpu
from bimamba_lit.ops.binary_linear import binary_linear
from bimamba_lit.ops.binary_weight import STRAIGHT_THROUGH, binary_weight
from bimamba_lit.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from bimamba_lit.ops.conv_ssd_norm import conv_ssd_norm
from bimamba_lit.ops.distillation_loss import distillation_loss, topk_distillation_loss
from bimamba_lit.ops.latent_linear import latent_linear
from bimamba_lit.ops.packed_blocks import fuses_block, packed_blocks
from bimamba_lit.ops.rms_norm import norm_and_residual, rms_norm
from bimamba_lit.ops.selective_scan import selective_scan, selective_scan_step
from bimamba_lit.ops.signs import pack_signs, unpack_signs
from bimamba_lit.ops.ssd import ssd, ssd_step

__all__ = [
    "BACKENDS",
    "DIVERGENCES",
    "STRAIGHT_THROUGH",
    "BlockParameters",
    "Packed",
    "as_on_gpu",
    "binary_linear",
    "binary_weight",
    "causal_conv1d",
    "causal_conv1d_step",
    "conv_ssd_norm",
    "distillation_loss",
    "fuses_block",
    "latent_linear",
    "norm_and_residual",
    "pack_signs",
    "packed_blocks",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "topk_distillation_loss",
    "unpack_signs",
]
