"""One token through Mamba-2 blocks with packed projections: the composition that every other form is held to.

Legend: B batch, D model width, E inner width, H heads, P head width, N state size, W taps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bimamba_lit.kernels.binary_linear.naive import binary_linear
from bimamba_lit.kernels.binary_linear.second_signs import chosen_inputs, whole_shift, with_doubled
from bimamba_lit.kernels.causal_conv1d.naive import causal_conv1d_step
from bimamba_lit.kernels.rms_norm.naive import rms_norm
from bimamba_lit.kernels.ssd.naive import accumulator, ssd_step


class Packed(NamedTuple):
    """A packed projection: signs (O, ceil(I / 8)) and the terms of `ops.binary_linear`.

    With a `bitmap` of the words of 32 inputs that have a second sign, (ceil(I / 32 / 8),) uint8, there are k inputs
    more behind the others, those of these words again, and terms for them: signs are (O, (I + k) / 8). `in_shift` may
    be that of the first I alone.
    """

    signs: Tensor
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    group_scale: Tensor | None = None
    in_shift: Tensor | None = None
    out_shift: Tensor | None = None
    bias: Tensor | None = None
    bitmap: Tensor | None = None


class BlockParameters(NamedTuple):
    """What a block is made of; one group of maps and of the gated norm.

    Attributes:
        norm_weight: Gains before the mixer (D,).
        in_proj: To z, x, B, C and dt: 2 E + 2 N + H rows.
        conv_weight: (E + 2 N, W).
        conv_bias: (E + 2 N,).
        dt_bias: (H,).
        A_log: (H,).
        D: (H,).
        gated_weight: Gains of the gated norm (E,).
        out_proj: D rows.
        eps: Of the norm before the mixer.
        gated_eps: Of the gated norm.
    """

    norm_weight: Tensor
    in_proj: Packed
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_weight: Tensor
    out_proj: Packed
    eps: float
    gated_eps: float


def packed_blocks(
    x: Tensor, conv_states: list[Tensor], ssm_states: list[Tensor], blocks: list[BlockParameters]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Take x (B, D) through blocks in a row; return it, and their states moved on by a token."""
    moved = []
    for conv_state, ssm_state, block in zip(conv_states, ssm_states, blocks, strict=True):
        x, *states = _block(x, conv_state, ssm_state, block)
        moved.append(states)
    return x, [conv for conv, _ in moved], [ssm for _, ssm in moved]


def _block(x: Tensor, conv_state: Tensor, ssm_state: Tensor, block: BlockParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Add the mixer's output to x; return it, and the states (B, E + 2 N, W - 1) and (B, H, P, N)."""
    batch, heads, width, size = ssm_state.shape
    inner, wide = heads * width, accumulator(x)
    normed = rms_norm(x.to(wide), block.norm_weight, eps=block.eps).to(block.norm_weight.dtype)
    projected = _project(normed, block.in_proj)
    z, xbc, dt = projected.split([inner, inner + 2 * size, heads], dim=1)
    xbc, conv_state = causal_conv1d_step(xbc, conv_state, block.conv_weight, block.conv_bias, "silu")
    values, into, out = xbc.split([inner, size, size], dim=1)
    y, ssm_state = ssd_step(
        ssm_state, values.reshape(batch, heads, width), dt.to(wide), -torch.exp(block.A_log.to(wide)),
        into[:, None], out[:, None], block.D, dt_bias=block.dt_bias, dt_softplus=True,
    )  # fmt: skip
    y = rms_norm(y.flatten(1), block.gated_weight, z, block.gated_eps)
    return x + _project(y, block.out_proj), conv_state, ssm_state


def _project(x: Tensor, packed: Packed) -> Tensor:
    if packed.bitmap is not None:
        inputs = x.shape[1]
        x = with_doubled(x, chosen_inputs(packed.bitmap, inputs, 8 * packed.signs.shape[1] - inputs))
    if packed.in_shift is not None:
        packed = packed._replace(in_shift=whole_shift(packed.in_shift, x.shape[1]))
    return binary_linear(x, packed.signs, x.shape[1], *packed[1:7])
