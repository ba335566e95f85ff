"""One token through a model's blocks: those whose projections are packed in the few launches of `ops.packed_blocks`."""

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.doubled_inputs import DoubledInputs
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.models.mamba2 import Mamba2
from bimamba_lit.models.norm import at_least_fp32
from bimamba_lit.models.state import LayerState

if TYPE_CHECKING:
    from bimamba_lit.models.lm import Block


def step_blocks(
    blocks: Iterable["Block"], x: Tensor, states: Iterable[LayerState]
) -> tuple[Tensor, tuple[LayerState, ...]]:
    """Do what ``Block.step`` of one block after the other does, with ``x`` (B, D); return it and the new states.

    On a GPU without gradients, packed Mamba-2 blocks in a row are one op where it has a kernel for them.
    """
    steps = [(_fused(x, state, block), block, state) for block, state in zip(blocks, states, strict=True)]
    moved: list[LayerState] = []
    for packed, run in groupby(steps, lambda step: step[0] is not None):
        if packed:
            parameters, _, before = zip(*run, strict=True)
            ssm_states = [at_least_fp32(state.ssm) for state in before]
            x, *after = ops.packed_blocks(x, [state.conv for state in before], ssm_states, list(parameters))
            moved += map(LayerState, *after)
            continue
        for _, block, state in run:
            x, state = block.step(x, state)
            moved.append(state)
    return x, tuple(moved)


def _fused(x: Tensor, state: LayerState, block: "Block") -> ops.BlockParameters | None:
    if not x.is_cuda or torch.is_grad_enabled():
        return None
    packed = packed_parameters(block)
    if packed is None or not ops.fuses_block(x, state.conv, at_least_fp32(state.ssm), packed):
        return None
    return packed


def packed_parameters(block: "Block") -> ops.BlockParameters | None:
    """Return what a block is made of, or None where it is not one for `ops.packed_blocks`."""
    mixer = block.mixer
    if not isinstance(mixer, Mamba2) or mixer.ngroups != 1 or mixer.D.dtype == torch.float64:
        return None
    in_proj, out_proj = _packed(mixer.in_proj), _packed(mixer.out_proj)
    if in_proj is None or out_proj is None:
        return None
    return ops.BlockParameters(
        block.norm.weight, in_proj, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias, mixer.A_log,
        mixer.D, mixer.norm.weight, out_proj, block.norm.eps, mixer.norm.eps,
    )  # fmt: skip


def _packed(layer: nn.Module) -> ops.Packed | None:
    """Return what a layer holds, where it is packed and takes activations as they are."""
    if isinstance(layer, DoubledInputs):
        packed = _packed(layer.binary)
        return packed and packed._replace(bitmap=layer.bitmap)
    if type(layer) is not PackedLinear or layer.activation_bits is not None:
        return None
    return ops.Packed(layer.signs, **layer.terms(), bias=layer.bias)
