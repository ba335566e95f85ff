"""The causal convolution's kernels: tiles forward, and backward a walk over time that reads every value once.

Legend: B batch, D channels, L length, W taps.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.pointwise import sigmoid, silu_slope


@triton.jit
def conv_forward(
    x, weight, bias, past, seq, y, wide, channels, length,
    x_b, x_d, x_l, weight_d, weight_w, past_b, past_d, past_w, seq_b, seq_l, y_b, y_d, y_l,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y; `wide` says by its type in what is summed, and is not read."""
    dtype = wide.dtype.element_ty
    b = tl.program_id(2).to(tl.int64)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    t = (tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]
    real = (d < channels) & (t < length)
    total = tl.zeros((BLOCK_L, BLOCK_D), dtype)
    if bias is not None:
        total += tl.load(bias + d, mask=d < channels, other=0.0).to(dtype)
    same = t < length
    for back in tl.static_range(W):
        value = tl.load(x + b * x_b + d * x_d + (t - back) * x_l, mask=real & (t >= back), other=0.0)
        if past is not None:
            at = past + b * past_b + d * past_d + (t - back + W - 1) * past_w
            before = tl.load(at, mask=real & (t < back), other=0.0).to(x.dtype.element_ty)
            value = tl.where(t < back, before, value)
        value = value.to(dtype)
        if seq is not None:
            if back > 0:
                inside = (t < length) & (t >= back)
                after = tl.load(seq + b * seq_b + (t - back + 1) * seq_l, mask=inside, other=0)
                same = same & (after == tl.load(seq + b * seq_b + (t - back) * seq_l, mask=inside, other=0))
            value = tl.where(same, value, 0.0)
        total += (
            tl.load(weight + d * weight_d + (W - 1 - back) * weight_w, mask=d < channels, other=0.0).to(dtype) * value
        )
    if SILU:
        total *= sigmoid(total)
    tl.store(y + b * y_b + d * y_d + t * y_l, total.to(y.dtype.element_ty), mask=real)


@triton.jit
def conv_backward(
    x, weight, bias, past, seq, gy, gx, g_past, g_weight, g_bias, channels, length,
    x_b, x_d, x_l, weight_d, weight_w, past_b, past_d, past_w, seq_b, seq_l, gy_b, gy_d, gy_l, gx_b, gx_d, gx_l,
    SILU: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and the past (B, W-1, D), and the span's part of the taps' (B*spans, W, D) and bias'.

    The gradient of an input is complete W - 1 tokens later; until then it waits in a register, with a factor that is 0
    once another document has begun.
    """
    dtype = g_weight.dtype.element_ty
    b = tl.program_id(2).to(tl.int64)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    real = d < channels
    first = tl.program_id(1) * SPAN
    end = tl.minimum(first + SPAN, length)
    x += b * x_b + d * x_d
    gy += b * gy_b + d * gy_d
    gx += b * gx_b + d * gx_d
    if past is not None:
        past += b * past_b + d * past_d
    if seq is not None:
        seq += b * seq_b
    shift = tl.zeros((BLOCK_D,), dtype)
    if bias is not None:
        shift = tl.load(bias + d, mask=real, other=0.0).to(dtype)
    taps = ()
    window = ()
    waiting = ()
    counts = ()
    g_taps = ()
    same = 1.0
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + d * weight_d + w * weight_w, mask=real, other=0.0).to(dtype),)
        g_taps = g_taps + (tl.zeros((BLOCK_D,), dtype),)
    for back in tl.static_range(1, W):
        t = first.to(tl.int64) - back
        value = tl.load(x + t * x_l, mask=real & (t >= 0), other=0.0)
        if past is not None:
            before = tl.load(past + (t + W - 1) * past_w, mask=real & (t < 0), other=0.0).to(x.dtype.element_ty)
            value = tl.where(t < 0, before, value)
        if seq is not None:
            if back > 1:
                after = tl.load(seq + (t + 1) * seq_l, mask=t >= 0, other=0)
                same = tl.where(after == tl.load(seq + t * seq_l, mask=t >= 0, other=0), same, 0.0)
            window = (value.to(dtype) * same,) + window
        else:
            window = (value.to(dtype),) + window
        waiting = waiting + (tl.zeros((BLOCK_D,), dtype),)
        counts = counts + (1.0,)
    g_shift = tl.zeros((BLOCK_D,), dtype)
    for i in range(SPAN + W - 1):
        t = first.to(tl.int64) + i
        if seq is not None:
            inside = (t > 0) & (t < length)
            now = tl.load(seq + t * seq_l, mask=inside, other=0)
            kept = tl.where(now == tl.load(seq + (t - 1) * seq_l, mask=inside, other=0), 1.0, 0.0)
            kept_window = ()
            kept_counts = ()
            for w in tl.static_range(W - 1):
                kept_window = kept_window + (window[w] * kept,)
                kept_counts = kept_counts + (counts[w] * kept,)
            window = kept_window
            counts = kept_counts
        window = window + (tl.load(x + t * x_l, mask=real & (t < length), other=0.0).to(dtype),)
        g = tl.load(gy + t * gy_l, mask=real & (t < length), other=0.0).to(dtype)
        if SILU:
            total = shift
            for w in tl.static_range(W):
                total += taps[w] * window[w]
            g *= silu_slope(total)
        done = ()
        waiting = waiting + (tl.zeros((BLOCK_D,), dtype),)
        counts = counts + (1.0,)
        for w in tl.static_range(W):
            if seq is not None:
                done = done + (waiting[w] + counts[w] * taps[w] * g,)
            else:
                done = done + (waiting[w] + taps[w] * g,)
        ready = t - (W - 1)
        tl.store(gx + ready * gx_l, done[0].to(gx.dtype.element_ty), mask=real & (ready >= first) & (ready < end))
        if past is not None:
            at = g_past + (b * (W - 1) + ready + W - 1) * channels + d
            tl.store(at, done[0], mask=real & (ready < 0))
        g = tl.where(t < end, g, 0.0)
        g_shift += g
        new_taps = ()
        for w in tl.static_range(W):
            new_taps = new_taps + (g_taps[w] + g * window[w],)
        g_taps = new_taps
        window = window[1:]
        waiting = done[1:]
        counts = counts[1:]
    part = b * tl.num_programs(1) + tl.program_id(1)
    for w in tl.static_range(W):
        tl.store(g_weight + (part * W + w) * channels + d, g_taps[w], mask=real)
    tl.store(g_bias + part * channels + d, g_shift, mask=real)


@triton.jit
def conv_step(
    x, state, weight, bias, y, wide, channels, x_b, x_d, state_b, state_d, state_w, weight_d, weight_w,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y (B, D) and move the state (B, D, W-1) on by a token, in place."""
    dtype = wide.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    real = d < channels
    state += b * state_b + d * state_d
    total = tl.zeros((BLOCK_D,), dtype)
    if bias is not None:
        total += tl.load(bias + d, mask=real, other=0.0).to(dtype)
    for w in tl.static_range(W):
        if w < W - 1:
            value = tl.load(state + w * state_w, mask=real, other=0.0)
        else:
            value = tl.load(x + b * x_b + d * x_d, mask=real, other=0.0)
        if w > 0:
            tl.store(state + (w - 1) * state_w, value, mask=real)
        total += tl.load(weight + d * weight_d + w * weight_w, mask=real, other=0.0).to(dtype) * value.to(dtype)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + b * channels + d, total.to(y.dtype.element_ty), mask=real)
