"""The step of packed Mamba-2 blocks in three launches each, as an operation that torch.compile knows.

Legend: B batch, D model width, E inner width, H heads, P head width, N state size, W taps.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_counts import counts_fit
from bimamba_lit.kernels.binary_linear.triton_words import (
    BITS,
    empty_digits,
    fits,
    launch_early,
    overlaps,
    row_arguments,
    row_constants,
    stride_of,
    writes_ptx,
)
from bimamba_lit.kernels.configurations import CompileCase, architecture, configuration
from bimamba_lit.kernels.packed_blocks import naive
from bimamba_lit.kernels.packed_blocks.naive import BlockParameters, Packed
from bimamba_lit.kernels.packed_blocks.triton_kernels import mix, project, scan, start

MOST_TOKENS = 4  # every token reads all signs anew, from the cache
LARGEST_STATE = 256

Made = tuple[Tensor, Tensor]  # digits or planes, and scales


def packed_blocks(
    x: Tensor, conv_states: list[Tensor], ssm_states: list[Tensor], blocks: list[BlockParameters]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute what `naive.packed_blocks` computes, in the states given where all are such that `supports` them."""
    steps = list(zip(conv_states, ssm_states, blocks, strict=True))
    if torch.is_grad_enabled() or not all(supports(x, *step) for step in steps):
        return naive.packed_blocks(x, conv_states, ssm_states, blocks)
    return _op(x, conv_states, ssm_states, *_flat(blocks)), conv_states, ssm_states


def supports(x: Tensor, conv_state: Tensor, ssm_state: Tensor, block: BlockParameters) -> bool:
    """Say whether the kernels can do this step."""
    _, heads, width, size = ssm_state.shape
    return (
        torch.version.hip is None
        and x.shape[0] <= MOST_TOKENS
        and ssm_state.dtype == torch.float32
        and conv_state.dtype != torch.float64
        and conv_state.shape[2] >= 1
        and width % BITS == 0
        and size <= LARGEST_STATE
        and x.shape[1] % BITS == 0
        and (_counted(x, block) or all(fits(_inputs(p), p.group_scale) for p in (block.in_proj, block.out_proj)))
    )


def _inputs(packed: Packed) -> int:
    """Return how many inputs, whole words, a projection has, those with a second sign twice."""
    return 8 * packed.signs.shape[1]


def _flat(blocks: list[BlockParameters]) -> tuple[list[Tensor | None], list[float]]:
    """Return the tensors and the numbers of blocks, as an operation takes them."""
    tensors = [[*block[:1], *block.in_proj, *block[2:8], *block.out_proj] for block in blocks]
    return sum(tensors, []), sum(([block.eps, block.gated_eps] for block in blocks), [])


def _unflat(tensors: list[Any], numbers: list[float]) -> list[BlockParameters]:
    each, size = len(tensors) // (len(numbers) // 2), len(Packed._fields)
    blocks = []
    for n in range(len(numbers) // 2):
        norm, *rest = tensors[n * each : (n + 1) * each]
        fields = [norm, Packed(*rest[:size]), *rest[size:-size], Packed(*rest[-size:]), *numbers[2 * n : 2 * n + 2]]
        blocks.append(BlockParameters(*fields))
    return blocks


@torch.library.custom_op("bimamba_lit::packed_blocks", mutates_args=("conv_states", "ssm_states"))
def _op(
    x: Tensor,
    conv_states: list[Tensor],
    ssm_states: list[Tensor],
    tensors: list[Tensor | None],
    numbers: list[float],
) -> Tensor:
    return run(x, conv_states, ssm_states, _unflat(tensors, numbers))


@_op.register_fake
def _(x, conv_states, ssm_states, tensors, numbers):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run(x: Tensor, conv_states: list[Tensor], ssm_states: list[Tensor], blocks: list[BlockParameters]) -> Tensor:
    """Launch a step: return the new x (B, D), and move the states on in place."""
    if architecture(x.device).startswith("gfx"):
        raise LookupError("no step of packed blocks for AMD")
    digits = 3 if blocks[0].norm_weight.dtype == torch.float32 else 2
    planes = all(_counted(x, block) for block in blocks)
    made = _start(x, blocks[0], digits, planes)
    for conv_state, ssm_state, block, after in zip(conv_states, ssm_states, blocks, [*blocks[1:], None], strict=True):
        projected = _project(made, conv_state, block, x.shape[1], digits, planes)
        gated = _scan(projected, ssm_state, block, digits, planes)
        x, made = _mix(x, gated, block, after, digits, planes)
    return x


def _counted(x: Tensor, block: BlockParameters) -> bool:
    return all(counts_fit(_inputs(p), p.group_scale, x.device) for p in (block.in_proj, block.out_proj))


def _writing(norm_weight: Tensor, packed: Packed, made: Made) -> tuple:
    """Return what kernels that write the inputs of a projection take, and what follows a norm's gains."""
    per_input = (norm_weight, packed.in_scale, packed.in_shift)
    shift = packed.in_shift
    shifted = _inputs(packed) if shift is None or stride_of(shift) == 0 else shift.shape[0]
    return *per_input, packed.bitmap, *made, *map(stride_of, per_input), norm_weight.shape[0], shifted


def _start(x: Tensor, block: BlockParameters, digits: int, planes: bool) -> Made:
    tokens, in_features = x.shape
    words = _inputs(block.in_proj) // BITS
    made = empty_digits(tokens, words, digits, x.device)
    chosen = configuration("packed_blocks/start", x.dtype, words, x.device)
    start[(in_features // BITS, tokens)](
        x, *x.stride(), *_writing(block.norm_weight, block.in_proj, made), W=words, DIGITS=digits,
        COPIES=chosen.num_warps if planes else 1, PTX=writes_ptx(x.device), PDL=overlaps(x.device),
        **chosen.launch(), **launch_early(x.device),
    )  # fmt: skip
    return made


def _project(
    made: Made, conv_state: Tensor, block: BlockParameters, in_features: int, digits: int, planes: bool
) -> Tensor:
    tokens, channels, past = conv_state.shape
    packed, weight = block.in_proj, block.conv_weight
    out_features, words = packed.signs.shape[0], _inputs(packed) // BITS
    heads = block.A_log.shape[0]
    y = torch.empty(tokens, out_features, dtype=torch.float32, device=conv_state.device)
    name = "packed_blocks/project_planes" if planes else "packed_blocks/project"
    chosen = configuration(name, weight.dtype, words, y.device)
    project[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        *row_arguments(packed.signs, made, packed[1:6], packed.bias),
        conv_state, weight, block.conv_bias, y, out_features, in_features, block.eps, out_features - channels - heads,
        channels, *conv_state.stride(), *weight.stride(), TAPS=past + 1,
        **row_constants(words, digits, y.device, chosen),
    )  # fmt: skip
    return y


def _scan(projected: Tensor, state: Tensor, block: BlockParameters, digits: int, planes: bool) -> Made:
    tokens, heads, width, size = state.shape
    packed, inner = block.out_proj, heads * width
    words = _inputs(packed) // BITS
    made = empty_digits(tokens, words, digits, state.device)
    chosen = configuration("packed_blocks/scan", state.dtype, size, state.device)
    per_head = (block.dt_bias, block.A_log, block.D)
    scan[(inner // BITS, tokens)](
        projected, state, *per_head, projected.shape[1], *state.stride(), *(t.stride(0) for t in per_head),
        *_writing(block.gated_weight, packed, made), P=width, N=size, BLOCK_N=triton.next_power_of_2(size), W=words,
        DIGITS=digits, COPIES=chosen.num_warps if planes else 1,
        PTX=writes_ptx(state.device), PDL=overlaps(state.device), **chosen.launch(), **launch_early(state.device),
    )  # fmt: skip
    return made


def _mix(
    x: Tensor, gated: Made, block: BlockParameters, after: BlockParameters | None, digits: int, planes: bool
) -> tuple[Tensor, Made]:
    """Return the new x and its digits for the block after; where there is none, those that came."""
    packed, words = block.out_proj, gated[0].shape[2]
    tokens, out_features = x.shape
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    made, writing = gated, (None,) * 4 + gated + (0,) * 5
    if after is not None:
        made = empty_digits(tokens, _inputs(after.in_proj) // BITS, digits, x.device)
        writing = _writing(after.norm_weight, after.in_proj, made)
    name = "packed_blocks/mix_planes" if planes else "packed_blocks/mix"
    chosen = configuration(name, block.norm_weight.dtype, words, x.device)
    mix[(triton.cdiv(out_features, BITS), tokens)](
        *row_arguments(packed.signs, gated, packed[1:6], packed.bias), x, y, out_features,
        block.gated_weight.shape[0], block.gated_eps, *x.stride(), *writing,
        NEXT=made[0].shape[2], COPIES=chosen.num_warps if planes else 1,
        **row_constants(words, digits, x.device, chosen),
    )  # fmt: skip
    return y, made


def compile_cases() -> list[CompileCase]:
    """Return the calls by which the kernels are compiled without a GPU."""

    def call(d_model: int, dtype: torch.dtype, more: bool, share_in: float = 0.0, share_out: float = 0.0) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        def packed(out_features: int, in_features: int, share: float = 0.0) -> Packed:
            bitmap = meta(in_features // 256, dtype=torch.uint8) if share else None
            shifted, in_features = in_features, in_features + BITS * int(share * in_features / BITS)
            signs = meta(out_features, in_features // 8, dtype=torch.uint8)
            if not more:
                return Packed(signs, in_scale=meta(in_features), in_shift=meta(shifted), bitmap=bitmap)
            rows, groups = meta(out_features), meta(out_features, in_features // 128)
            return Packed(signs, out_scale=rows, group_scale=groups, out_shift=rows, bias=rows)

        inner, size = 2 * d_model, 128
        heads, channels = inner // 64, inner + 2 * size
        block = BlockParameters(
            meta(d_model), packed(inner + channels + heads, d_model, share_in), meta(channels, 4), meta(channels),
            meta(heads), meta(heads), meta(heads), meta(inner), packed(d_model, inner, share_out), 1e-5, 1e-5,
        )  # fmt: skip
        x, conv_state = meta(1, d_model, dtype=torch.float32), meta(1, channels, 3)
        state = meta(1, heads, 64, size, dtype=torch.float32)
        if not supports(x, conv_state, state, block):
            raise LookupError("no step of blocks so wide without counts")
        run(x, [conv_state] * 2, [state] * 2, [block] * 2)

    return [
        CompileCase("780M bf16", partial(call, 1536, torch.bfloat16, False), representative=True),
        CompileCase("2.7B bf16", partial(call, 2560, torch.bfloat16, False)),
        CompileCase("2.7B fp32", partial(call, 2560, torch.float32, False)),
        CompileCase("2.7B bf16, second signs", partial(call, 2560, torch.bfloat16, False, 0.25, 0.73)),
        CompileCase("1.3B fp32, 67 words of in_proj", partial(call, 2048, torch.float32, False, 0.05, 0.0)),
        CompileCase("2.7B bf16, two signs in all of in_proj", partial(call, 2560, torch.bfloat16, False, 1.0, 0.0)),
        CompileCase("wide bf16, two signs in all of in_proj", partial(call, 4608, torch.bfloat16, False, 1.0, 0.0)),
        CompileCase("2.7B bf16, two signs in all of out_proj", partial(call, 2560, torch.bfloat16, False, 0.0, 1.0)),
        CompileCase("780M fp32, second signs", partial(call, 1536, torch.float32, False, 0.0, 0.6)),
        CompileCase("2.7B fp32, all rows' terms", partial(call, 2560, torch.float32, True)),
    ]
