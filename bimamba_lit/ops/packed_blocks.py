"""One token through packed Mamba-2 blocks.

B batch, D and E model and inner width, H heads, P head width, N state size, W taps.
"""

import sys

import torch
from torch import Tensor

from bimamba_lit.kernels.packed_blocks import naive
from bimamba_lit.kernels.packed_blocks.naive import BlockParameters
from bimamba_lit.ops.arguments import check_block, check_dimensions
from bimamba_lit.ops.backends import has_triton_form, pick


def packed_blocks(
    x: Tensor,
    conv_states: list[Tensor],
    ssm_states: list[Tensor],
    blocks: list[BlockParameters],
    *,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Take one token through Mamba-2 blocks whose projections are packed; may overwrite the states given.

    The Triton form is three launches a block, for a few tokens; elsewhere it is the composition of `rms_norm`,
    `binary_linear`, `causal_conv1d_step` and `ssd_step`. One group of maps and of the gated norm.

    Args:
        x: The residual stream (B, D).
        conv_states: Of each block, the W - 1 inputs of the convolution before (B, E + 2 N, W - 1), oldest first.
        ssm_states: Of each block, the state before (B, H, P, N), with H P = E.
        blocks: Parameters of blocks in a row, with both projections as `Packed`.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        The new residual stream (B, D) in x's dtype, and the new states of each block.

    Raises:
        ValueError: If a shape or the backend is wrong.
    """
    check_dimensions("x", x, "B D")
    if not len(conv_states) == len(ssm_states) == len(blocks) > 0:
        raise ValueError(
            f"there are {len(blocks)} blocks, {len(conv_states)} conv_states and {len(ssm_states)} ssm_states, but "
            "must be as many of each, and at least one."
        )
    for conv_state, ssm_state, block in zip(conv_states, ssm_states, blocks, strict=True):
        check_block(x, conv_state, ssm_state, block)
    return pick(backend, x, naive.packed_blocks)(x, conv_states, ssm_states, blocks)


def fuses_block(x: Tensor, conv_state: Tensor, ssm_state: Tensor, block: BlockParameters) -> bool:
    """Say whether `packed_blocks` has a kernel for a block's step, without gradients: else its own ops are faster.

    Args:
        x: As for `packed_blocks`, (B, D); of it and the states the shapes, dtypes and devices count.
        conv_state: (B, E + 2N, W - 1).
        ssm_state: (B, H, P, N).
        block: What the block is made of.
    """
    module = "bimamba_lit.kernels.packed_blocks.triton"
    if not x.is_cuda or x.dtype == torch.float64 or not has_triton_form(module, "supports"):
        return False
    return bool(sys.modules[module].supports(x, conv_state, ssm_state, block))
