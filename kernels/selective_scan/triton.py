"""The selective scan in Triton, as operations that torch.compile and autograd know."""

import math
from typing import Any

import torch
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import accumulator
from bimamba_lit.kernels.configurations import CompileCase, Configuration, configuration
from bimamba_lit.kernels.selective_scan.naive import selective_scan_step as naive_step
from bimamba_lit.kernels.selective_scan.triton_kernels import scan_backward, scan_ends, scan_forward
from bimamba_lit.kernels.selective_scan.triton_step import run_step, step

_LOG2_E = 1 / math.log(2.0)
SPAN, MOST_SPANS = 256, 32  # tokens; at most so many spans to a sequence, which are longer then


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `naive.selective_scan` computes."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_states)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last, _ = _scan(*inputs, seq_idx, delta_softplus, keep)
    return (y, last) if return_last_state else y


class _Sizes:
    """How the work is laid out: programs of a few channels of one group, for each span of tokens and each sequence."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        self.batch, self.channels, self.length = u.shape
        self.size = A.shape[1]
        self.groups = tuple(maps.shape[1] if maps.ndim == 4 else 1 for maps in (B, C))
        self.maps = math.lcm(*self.groups)
        self.width = self.channels // self.maps
        self.every = _every(u)
        self.span = _span(self.length, self.every)
        self.padded = _padded(self.length, self.every)
        self.spans = self.padded // self.span

    def grid(self, block: int) -> tuple[int, int, int]:
        """Return the programs of blocks of channels, spans and sequences."""
        return self.maps * math.ceil(self.width / block), self.spans, self.batch

    def numbers(self, block: int, *groups: int) -> tuple[int, ...]:
        """Return what every kernel is told."""
        blocks = math.ceil(self.width / block)
        return self.channels, self.length, self.width, blocks, self.maps, *groups, self.span, self.padded

    def rows(self, maps: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, L) or (B, G, N, L) -> (B, G, L, N), filled up with zeros to whole spans."""
        maps = maps[:, None] if maps.ndim == 3 else maps
        batch, groups, size, length = maps.shape
        rows = maps.new_zeros(batch, groups, self.padded, size, dtype=dtype)
        rows[:, :, :length] = maps.transpose(2, 3)
        return rows

    def ends(
        self, u: Tensor, delta: Tensor, rates: Tensor, maps: Tensor, z: Tensor | None, delta_bias: Tensor | None,
        seq_idx: Tensor | None, softplus: bool, reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return what a span makes of a state of zero (B, S, N, D), its steps' sum (B, S, D), if it is whole (B, S)."""
        chosen = configuration("selective_scan/ends", u.dtype, self.channels, u.device)
        block, wide = chosen.blocks["BLOCK_D"], rates.dtype
        ends = u.new_empty(self.batch, self.spans, self.size, self.channels, dtype=wide)
        sums = u.new_empty(self.batch, self.spans, self.channels, dtype=wide)
        whole = u.new_empty(self.batch, self.spans, dtype=wide)
        if self.spans > 1:
            scan_ends[self.grid(block)](
                u, delta, rates, maps, z, delta_bias, seq_idx, ends, sums, whole,
                *self.numbers(block, maps.shape[1]), *u.stride(), *delta.stride(), *_strides(z), *_strides(seq_idx, 2),
                REVERSE=reverse, SOFTPLUS=softplus, N=self.size, LOG_T=_log(chosen), **chosen.launch(),
            )  # fmt: skip
        return ends, sums, whole


def _span(length: int, every: int) -> int:
    """Return the tokens of a span, whole chunks of `every`; a program reads the ends of all other spans: no crowds."""
    return math.ceil(min(length, max(SPAN, math.ceil(length / MOST_SPANS))) / every) * every


def _padded(length: int, every: int) -> int:
    span = _span(length, every)
    return math.ceil(length / span) * span


def _log(chosen: Configuration) -> int:
    return chosen.blocks["T"].bit_length() - 1


def _rates(A: Tensor, dtype: torch.dtype) -> Tensor:
    """(D, N) -> (N, D), for exp2."""
    return (A.to(dtype) * _LOG2_E).t().contiguous()


def _strides(t: Tensor | None, count: int = 3) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()


def _outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(u)
    batch, channels, length = u.shape
    every = _every(u)
    chunks = _padded(length, every) // every if keep else 0
    last = u.new_empty(batch, channels, A.shape[1], dtype=wide)
    return torch.empty_like(u), last, u.new_empty(batch, chunks, A.shape[1], channels, dtype=wide)


@torch.library.custom_op("bimamba_lit::selective_scan", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, seq_idx: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(u, delta, A, B, C, D, z, delta_bias, initial, seq_idx, softplus, keep)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial, seq_idx, softplus, keep):
    return _outputs(u, A, keep)


def _every(u: Tensor) -> int:
    return configuration("selective_scan/backward", u.dtype, u.shape[1], u.device).blocks["T"]


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, seq_idx: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = configuration("selective_scan/forward", u.dtype, u.shape[1], u.device)
    sizes, wide, block = _Sizes(u, A, B, C), accumulator(u), chosen.blocks["BLOCK_D"]
    y, last, kept = _outputs(u, A, keep)
    rates, B, C, delta_bias = _rates(A, wide), sizes.rows(B, wide), sizes.rows(C, wide), _vector(delta_bias)
    ends = sizes.ends(u, delta, rates, B, None, delta_bias, seq_idx, softplus, reverse=False)
    scan_forward[sizes.grid(block)](
        u, delta, rates, B, C, _vector(D), z, delta_bias, initial, seq_idx, y, last, kept if keep else None, *ends,
        *sizes.numbers(block, *sizes.groups), *u.stride(), *delta.stride(), *_strides(z), *y.stride(),
        *_strides(initial), *_strides(seq_idx, 2),
        SOFTPLUS=softplus, N=sizes.size, EVERY=sizes.every, LOG_T=_log(chosen), **chosen.launch(),
    )  # fmt: skip
    return y, last, kept


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@torch.library.custom_op("bimamba_lit::selective_scan_backward", mutates_args=())
def _scan_backward(
    gy: Tensor, g_last: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, seq_idx: Tensor | None, kept: Tensor, softplus: bool,
) -> list[Tensor]:  # fmt: skip
    return _backward(gy, g_last, u, delta, A, B, C, D, z, delta_bias, seq_idx, kept, softplus)


@_scan_backward.register_fake
def _(gy, g_last, u, delta, A, B, C, D, z, delta_bias, seq_idx, kept, softplus):
    gu = torch.empty_like(u)
    wide = kept.dtype
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, B, C))
    one = u.new_empty(u.shape[1], dtype=wide)
    initial = u.new_empty(u.shape[0], *A.shape, dtype=wide)
    return [
        gu,
        torch.empty_like(gu, dtype=delta.dtype),
        *like,
        one,
        torch.empty_like(gu, dtype=(delta if z is None else z).dtype),
        torch.empty_like(one),
        initial,
    ]


def _backward(
    gy: Tensor, g_last: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, seq_idx: Tensor | None, kept: Tensor, softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and the first state; z's is rubbish without z."""
    chosen = configuration("selective_scan/backward", u.dtype, u.shape[1], u.device)
    sizes, wide, block = _Sizes(u, A, B, C), kept.dtype, chosen.blocks["BLOCK_D"]
    grid = sizes.grid(block)
    gu = torch.empty_like(u)
    g_delta, gz = torch.empty_like(gu, dtype=delta.dtype), torch.empty_like(gu, dtype=(delta if z is None else z).dtype)
    rates, rows_B, rows_C, delta_bias = _rates(A, wide), sizes.rows(B, wide), sizes.rows(C, wide), _vector(delta_bias)
    ends = sizes.ends(gy, delta, rates, rows_C, z, delta_bias, seq_idx, softplus, reverse=True)
    carry, gA = torch.empty_like(ends[0]), torch.empty_like(ends[0])
    gB = u.new_empty(grid[0], sizes.batch, sizes.size, sizes.padded, dtype=wide)
    gC = torch.empty_like(gB)
    gD, g_bias = torch.empty_like(ends[1]), torch.empty_like(ends[1])
    scan_backward[grid](
        u, delta, rates, rows_B, rows_C, _vector(D), z, delta_bias, seq_idx, kept, gy, _vector(g_last), *ends, carry,
        gu, g_delta, gz, gA, gB, gC, gD, g_bias, *sizes.numbers(block, *sizes.groups),
        *u.stride(), *delta.stride(), *_strides(z), *gy.stride(), *gu.stride(), *_strides(seq_idx, 2),
        SOFTPLUS=softplus, N=sizes.size, LOG_T=_log(chosen), **chosen.launch(),
    )  # fmt: skip
    return [
        gu, g_delta, gA.sum((0, 1)).t().contiguous().to(A.dtype), _summed(gB, B), _summed(gC, C), gD.sum((0, 1)), gz,
        g_bias.sum((0, 1)), carry[:, 0].transpose(1, 2).contiguous(),
    ]  # fmt: skip


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    """(programs, B, N, L) -> the shape of `like`, summed over the programs that share a map."""
    parts = parts[..., : like.shape[-1]]
    if like.ndim == 3:
        return parts.sum(0).to(like.dtype)
    return parts.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1).contiguous().to(like.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial, seq_idx, softplus, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, seq_idx, output[2])
    ctx.softplus = softplus
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gy: Tensor | None, g_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, seq_idx, kept = ctx.saved_tensors
    if gy is None:
        gy = torch.zeros_like(u)
    gu, g_delta, gA, gB, gC, gD, gz, g_bias, g_initial = _scan_backward(
        gy, g_last, u, delta, A, B, C, D, z, delta_bias, seq_idx, kept, ctx.softplus
    )
    return (
        gu, g_delta, gA, gB, gC,
        None if D is None else gD.to(D.dtype),
        None if z is None else gz,
        None if delta_bias is None else g_bias.to(delta_bias.dtype),
        None if ctx.initial_dtype is None else g_initial.to(ctx.initial_dtype),
        None, None, None,
    )  # fmt: skip


_scan.register_autograd(_gradients, setup_context=_setup)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute what `naive.selective_scan_step` computes; while no gradients are recorded, in the state given."""
    if torch.is_grad_enabled():
        return naive_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    state = state.to(accumulator(u))
    return step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus), state


def compile_cases() -> list[CompileCase]:
    """Return the calls by which the kernels are compiled without a GPU."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def both(dtype: torch.dtype, more: bool) -> None:
        batch, length, channels, size = 8, 2048, 5120, 16
        u, delta = meta(batch, length, channels, dtype=dtype).mT, meta(batch, length, channels, dtype=dtype).mT
        z = None if more else meta(batch, length, 2 * channels, dtype=dtype)[..., channels:].mT
        maps = meta(batch, length, 160 + 2 * size, dtype=dtype)
        B, C = maps[..., 160:-size].mT, maps[..., -size:].mT
        A, D = meta(channels, size, dtype=torch.float32), meta(channels, dtype=torch.float32)
        initial = meta(batch, channels, size, dtype=torch.float32) if more else None
        seq_idx = meta(batch, length, dtype=torch.int32) if more else None
        y, last, kept = _forward(u, delta, A, B, C, D, z, D, initial, seq_idx, True, True)
        _backward(y, last if more else None, u, delta, A, B, C, D, z, D, seq_idx, kept, True)

    def step() -> None:
        channels, size = 5120, 16
        u, maps = meta(1, channels), meta(1, size)
        A, D = meta(channels, size, dtype=torch.float32), meta(channels, dtype=torch.float32)
        run_step(meta(1, channels, size, dtype=torch.float32), u, u, A, maps, maps, D, u, D, True)

    return [
        CompileCase("bf16", lambda: both(torch.bfloat16, False), representative=True),
        CompileCase("fp32, documents", lambda: both(torch.float32, True)),
        CompileCase("step", step),
    ]
