"""The causal convolution in Triton, as operations that torch.compile and autograd know."""

import math
from typing import Any

import torch
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d import naive
from bimamba_lit.kernels.causal_conv1d.naive import accumulator
from bimamba_lit.kernels.causal_conv1d.triton_kernels import conv_backward, conv_forward, conv_step
from bimamba_lit.kernels.configurations import CompileCase, configuration
from bimamba_lit.kernels.sums import sum_parts


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `naive.causal_conv1d` computes."""
    y = _conv(x, weight, bias, initial_states, seq_idx, activation is not None)
    if not return_final_states:
        return y
    taps = weight.shape[1]
    past = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states.to(x.dtype)
    states = torch.cat([past, x[..., max(x.shape[2] - taps + 1, 0) :]], dim=2)
    states = states[..., states.shape[2] - taps + 1 :]
    if seq_idx is None:
        return y, states.clone()
    documents = naive.document_numbers(seq_idx)
    documents = torch.cat([documents[:, :1].expand(-1, taps - 1), documents], dim=1)[:, x.shape[2] :]
    return y, states * (documents == naive.document_numbers(seq_idx)[:, -1:])[:, None].to(x.dtype)


def causal_conv1d_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `naive.causal_conv1d_step` computes; while no gradients are recorded, in the state given."""
    if torch.is_grad_enabled():
        return naive.causal_conv1d_step(x, conv_state, weight, bias, activation)
    state = conv_state.to(x.dtype)
    return _step(x, state, weight, bias, activation is not None), state


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()


@torch.library.custom_op("bimamba_lit::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    return forward(x, weight, bias, past, seq_idx, silu)


@_conv.register_fake
def _(x, weight, bias, past, seq_idx, silu):
    return torch.empty_like(x)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    """Return y (B, D, L), dense, in x's order of dimensions."""
    batch, channels, length = x.shape
    chosen = configuration("causal_conv1d/forward", x.dtype, channels, x.device)
    y = torch.empty_like(x)
    grid = (_parts(channels, chosen.blocks["BLOCK_D"]), _parts(length, chosen.blocks["BLOCK_L"]), batch)
    conv_forward[grid](
        x, weight, _vector(bias), past, seq_idx, y, x.new_empty(0, dtype=accumulator(x)), channels, length, *x.stride(),
        *weight.stride(), *_strides(past, 3), *_strides(seq_idx, 2), *y.stride(),
        SILU=silu, W=weight.shape[1], **chosen.launch(),
    )  # fmt: skip
    return y


def _parts(count: int, block: int) -> int:
    return math.ceil(count / block)


@torch.library.custom_op("bimamba_lit::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(gy, x, weight, bias, past, seq_idx, silu, torch.empty_like(x))


@_conv_backward.register_fake
def _(gy, x, weight, bias, past, seq_idx, silu):
    batch, channels, _ = x.shape
    taps = weight.shape[1]
    wide = accumulator(x)
    return (
        torch.empty_like(x),
        x.new_empty(taps, channels, dtype=wide).t(),
        x.new_empty(channels, dtype=wide),
        x.new_empty(batch if past is not None else 0, taps - 1, channels, dtype=wide).transpose(1, 2),
    )


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, seq_idx: Tensor | None, silu: bool,
    gx: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, in `gx`, and of weight, bias and the past in the accumulator's dtype."""
    batch, channels, length = x.shape
    taps = weight.shape[1]
    wide = accumulator(x)
    chosen = configuration("causal_conv1d/backward", x.dtype, channels, x.device)
    spans = _parts(length, chosen.blocks["SPAN"])
    g_past = x.new_empty(batch if past is not None else 0, taps - 1, channels, dtype=wide)
    g_weight = x.new_empty(batch * spans, taps, channels, dtype=wide)
    g_bias = x.new_empty(batch * spans, channels, dtype=wide)
    conv_backward[(_parts(channels, chosen.blocks["BLOCK_D"]), spans, batch)](
        x, weight, _vector(bias), past, seq_idx, gy, gx, g_past, g_weight, g_bias, channels, length, *x.stride(),
        *weight.stride(), *_strides(past, 3), *_strides(seq_idx, 2), *gy.stride(), *gx.stride(),
        SILU=silu, W=taps, **chosen.launch(),
    )  # fmt: skip
    return gx, sum_parts(g_weight).t(), sum_parts(g_bias), g_past.transpose(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, past, seq_idx = ctx.saved_tensors
    gx, g_weight, g_bias, g_past = _conv_backward(gy, x, weight, bias, past, seq_idx, ctx.silu)
    return (
        gx,
        g_weight.to(weight.dtype),
        None if bias is None else g_bias.to(bias.dtype),
        None if past is None else g_past.to(past.dtype),
        None,
        None,
    )


_conv.register_autograd(_gradients, setup_context=_setup)


@torch.library.custom_op("bimamba_lit::causal_conv1d_step", mutates_args=("state",))
def _step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _run_step(x, state, weight, bias, silu)


@_step.register_fake
def _(x, state, weight, bias, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    batch, channels = x.shape
    chosen = configuration("causal_conv1d/step", x.dtype, channels, x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    conv_step[(_parts(channels, chosen.blocks["BLOCK_D"]), batch)](
        x, state, weight, _vector(bias), y, x.new_empty(0, dtype=accumulator(x)), channels, *x.stride(),
        *state.stride(), *weight.stride(), SILU=silu, W=weight.shape[1], **chosen.launch(),
    )  # fmt: skip
    return y


def compile_cases() -> list[CompileCase]:
    """Return the calls by which the kernels are compiled without a GPU."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def both(dtype: torch.dtype, more: bool) -> None:
        channels = 5376
        x = meta(8, 2048, 10576, dtype=dtype)[..., 5120 : 5120 + channels].mT
        weight, bias = meta(channels, 4, dtype=torch.float32), meta(channels, dtype=torch.float32)
        past = meta(8, channels, 3, dtype=dtype) if more else None
        seq_idx = meta(8, 2048, dtype=torch.int32) if more else None
        y = forward(x, weight, bias, past, seq_idx, True)
        backward(y, x, weight, bias, past, seq_idx, True, torch.empty_like(x))

    def step() -> None:
        _run_step(meta(1, 5376), meta(1, 5376, 3), meta(5376, 4), meta(5376), True)

    return [
        CompileCase("bf16", lambda: both(torch.bfloat16, False)),
        CompileCase("fp32, documents", lambda: both(torch.float32, True)),
        CompileCase("step", step),
    ]
