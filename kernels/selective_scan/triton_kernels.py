"""The selective scan's kernels: a program walks over a span of tokens for a few channels, one or more a thread.

The state has a decay for every channel and entry, so there is nothing to multiply as matrices: the cost is one
exponential an entry and token. Everything is a vector over channels, a token's N states are N such vectors that never
leave the registers, and the reads of y are sums within a thread. Tokens are loaded some at a time, as tiles that are
taken apart to vectors.

A walk over a whole sequence would leave most of a GPU idle, so each span has programs of its own. `scan_ends` walks all
spans at once, from a state of zero; the decay of a whole span is exp2(A times the sum of its step sizes), so what comes
before a span is found from the ends of those before it. The forward writes the states down every `EVERY` tokens; the
backward goes through these chunks from the last to the first, computes a chunk's states again, and needs sums over
channels, for the gradients of B and C, one for each program, added up afterwards in a fixed order.

B and C come as (B, G, L, N) of the accumulator's dtype, filled up with zeros to whole spans, A as (N, D), times log2(e)
so that exp2 serves. Offsets that grow with batch, length or channels are 64 bits wide.

Legend: B batch, D channels, L length, G groups, N state size, S spans, T tokens unrolled.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.pointwise import LN_2, LOG2_E, sigmoid, silu_slope, softplus


@triton.jit
def _place(channels, width, blocks, BLOCK_D: tl.constexpr):
    """Return sequence, group, channels (int64) and which of them are real, for this program."""
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.program_id(2).to(tl.int64), group, (group * width + inside).to(tl.int64), inside < width


@triton.jit
def _begins(seq, t, length, stride):
    """Whether a new document begins at token t."""
    now = tl.load(seq + t * stride, mask=t < length, other=0)
    before = tl.load(seq + (t - 1) * stride, mask=(t > 0) & (t < length), other=0)
    return (t > 0) & (t < length) & (now != before)


@triton.jit
def _rows(tile, T: tl.constexpr, LOG_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Take (T, D) apart to T vectors (D,)."""
    parts = (tl.trans(tile),)
    for level in tl.static_range(LOG_T):
        firsts = ()
        seconds = ()
        for i in tl.static_range(1 << level):
            if level < LOG_T - 1:
                first, second = tl.split(tl.reshape(parts[i], (BLOCK_D, T >> (level + 1), 2)))
            else:
                first, second = tl.split(parts[i])
            firsts = firsts + (first,)
            seconds = seconds + (second,)
        parts = firsts + seconds
    return parts


@triton.jit
def _tile(rows, T: tl.constexpr, LOG_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Put T vectors (D,) together to (T, D)."""
    for level in tl.static_range(LOG_T):
        joined = ()
        for i in tl.static_range(T >> (level + 1)):
            joined = joined + (tl.join(rows[i], rows[i + (T >> (level + 1))]),)
        rows = joined
    return tl.trans(tl.reshape(rows[0], (BLOCK_D, T)))


@triton.jit
def _vector(values, d, real, dtype: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return optional values (D,) as (1, D); none are zeros."""
    found = tl.zeros((BLOCK_D,), dtype)
    if values is not None:
        found = tl.load(values + d, mask=real, other=0.0).to(dtype)
    return found[None, :]


@triton.jit
def _load(t, t_b, t_l, t_d, b, token, d, mask, dtype: tl.constexpr):
    """Load a tile (T, D) of a tensor (B, D, L)."""
    return tl.load(t + b * t_b + token * t_l + d[None, :] * t_d, mask=mask, other=0.0).to(dtype)


@triton.jit
def _step_sizes(delta, delta_b, delta_l, delta_d, b, token, d, mask, bias, SOFTPLUS: tl.constexpr, dtype: tl.constexpr):
    """Load a tile of step sizes; where there is no token they are 0, which changes no state."""
    step = _load(delta, delta_b, delta_l, delta_d, b, token, d, mask, dtype) + bias
    if SOFTPLUS:
        step = softplus(step)
    return tl.where(mask, step, 0.0)


@triton.jit
def scan_ends(
    u, delta, A, maps_in, z, delta_bias, seq, ends, sums, whole,
    channels, length, width, blocks, maps, groups, span, padded,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, seq_b, seq_l,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
    LOG_T: tl.constexpr,
):  # fmt: skip
    """Write what a span makes of a state of zero (B, S, N, D), its steps' sum (B, S, D), if it is whole (B, S).

    A span is whole if no document begins in it. In reverse, the states are the gradients of the states, `u` is the
    gradient of y, and the maps are those of C.
    """
    dtype = ends.dtype.element_ty
    b, group, d, real = _place(channels, width, blocks, BLOCK_D)
    s = tl.program_id(1)
    at_span = b * tl.num_programs(1) + s
    maps_in += (b * groups + group * groups // maps) * padded * N
    if seq is not None:
        seq += b * seq_b
    bias = _vector(delta_bias, d, real, dtype, BLOCK_D)
    rates = ()
    states = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A + n * channels + d, mask=real, other=0.0),)
        states = states + (tl.zeros((BLOCK_D,), dtype),)
    total = tl.zeros((BLOCK_D,), dtype)
    one = 1.0
    for i in range(span // T):
        if REVERSE:
            start = tl.full((), s * span + span - T - i * T, tl.int64)
        else:
            start = tl.full((), s * span + i * T, tl.int64)
        token = (start + tl.arange(0, T))[:, None]
        mask = real[None, :] & (token < length)
        value = _load(u, u_b, u_l, u_d, b, token, d, mask, dtype)
        step = _step_sizes(delta, delta_b, delta_l, delta_d, b, token, d, mask, bias, SOFTPLUS, dtype)
        total += tl.sum(step, axis=0)
        if REVERSE:
            if z is not None:
                gate = _load(z, z_b, z_l, z_d, b, token, d, mask, dtype)
                value *= gate * sigmoid(gate)
        else:
            value *= step
        values = _rows(value, T, LOG_T, BLOCK_D)
        steps = _rows(step, T, LOG_T, BLOCK_D)
        for k in tl.static_range(T):
            if seq is not None:
                going_on = tl.where(_begins(seq, start + (T - 1 - k if REVERSE else k), length, seq_l), 0.0, 1.0)
                one *= going_on
            after = ()
            for n in tl.static_range(N):
                decay = tl.exp2(steps[T - 1 - k if REVERSE else k] * rates[n])
                if seq is not None:
                    decay *= going_on
                new = tl.load(maps_in + (start + (T - 1 - k if REVERSE else k)) * N + n)
                new *= values[T - 1 - k if REVERSE else k]
                if REVERSE:
                    after = after + (decay * (states[n] + new),)
                else:
                    after = after + (decay * states[n] + new,)
            states = after
    for n in tl.static_range(N):
        tl.store(ends + (at_span * N + n) * channels + d, states[n], mask=real)
    tl.store(sums + at_span * channels + d, total, mask=real)
    tl.store(whole + at_span, one)


@triton.jit
def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial, seq, y, last, kept, ends, sums, whole,
    channels, length, width, blocks, maps, groups_B, groups_C, span, padded,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, initial_b, initial_d, initial_n,
    seq_b, seq_l,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
    LOG_T: tl.constexpr,
):  # fmt: skip
    """Write y, the last state (B, D, N) and, if `kept` is given, the state before each chunk (B, L/EVERY, N, D)."""
    dtype = last.dtype.element_ty
    b, group, d, real = _place(channels, width, blocks, BLOCK_D)
    s = tl.program_id(1)
    B += (b * groups_B + group * groups_B // maps) * padded * N
    C += (b * groups_C + group * groups_C // maps) * padded * N
    if seq is not None:
        seq += b * seq_b
    bias = _vector(delta_bias, d, real, dtype, BLOCK_D)
    skip = _vector(D, d, real, dtype, BLOCK_D)
    rates = ()
    states = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A + n * channels + d, mask=real, other=0.0),)
        if initial is None:
            states = states + (tl.zeros((BLOCK_D,), dtype),)
        else:
            first = initial + b * initial_b + d * initial_d + n * initial_n
            states = states + (tl.load(first, mask=real, other=0.0).to(dtype),)
    for before in range(s):
        at_span = b * tl.num_programs(1) + before
        total = tl.load(sums + at_span * channels + d, mask=real, other=0.0)
        one = tl.load(whole + at_span)
        after = ()
        for n in tl.static_range(N):
            end = tl.load(ends + (at_span * N + n) * channels + d, mask=real, other=0.0)
            after = after + (tl.exp2(total * rates[n]) * one * states[n] + end,)
        states = after
    for c in range(span // EVERY):
        if kept is not None:
            for n in tl.static_range(N):
                at = kept + ((b * (padded // EVERY) + s * (span // EVERY) + c) * N + n) * channels + d
                tl.store(at, states[n], mask=real)
        for i in range(EVERY // T):
            start = tl.full((), s * span + c * EVERY + i * T, tl.int64)
            token = (start + tl.arange(0, T))[:, None]
            mask = real[None, :] & (token < length)
            x = _load(u, u_b, u_l, u_d, b, token, d, mask, dtype)
            step = _step_sizes(delta, delta_b, delta_l, delta_d, b, token, d, mask, bias, SOFTPLUS, dtype)
            steps = _rows(step, T, LOG_T, BLOCK_D)
            scaled = _rows(step * x, T, LOG_T, BLOCK_D)
            reads = ()
            for t in tl.static_range(T):
                if seq is not None:
                    going_on = tl.where(_begins(seq, start + t, length, seq_l), 0.0, 1.0)
                read = tl.zeros((BLOCK_D,), dtype)
                after = ()
                for n in tl.static_range(N):
                    decay = tl.exp2(steps[t] * rates[n])
                    if seq is not None:
                        decay *= going_on
                    state = decay * states[n] + tl.load(B + (start + t) * N + n) * scaled[t]
                    read += tl.load(C + (start + t) * N + n) * state
                    after = after + (state,)
                states = after
                reads = reads + (read,)
            out = _tile(reads, T, LOG_T, BLOCK_D) + skip * x
            if z is not None:
                gate = _load(z, z_b, z_l, z_d, b, token, d, mask, dtype)
                out *= gate * sigmoid(gate)
            tl.store(y + b * y_b + token * y_l + d[None, :] * y_d, out.to(y.dtype.element_ty), mask=mask)
    if s == tl.num_programs(1) - 1:
        for n in tl.static_range(N):
            tl.store(last + (b * channels + d) * N + n, states[n], mask=real)


@triton.jit
def _store_sums(to, tile, T: tl.constexpr, BLOCK_D: tl.constexpr, BY_DOT: tl.constexpr):
    """Store the sums over channels of (T, D), side by side."""
    to += tl.arange(0, T)
    if BY_DOT:
        # A product with ones is a sum by the tensor cores; all its columns are the same.
        column = tl.arange(0, 16)[None, :]
        sums = tl.dot(tile, tl.full((BLOCK_D, 16), 1.0, tile.dtype))
        tl.store(to[:, None] + column, sums, mask=(column == 0) & (tl.arange(0, T) >= 0)[:, None])
    else:
        tl.store(to, tl.sum(tile, axis=1))


@triton.jit
def scan_backward(
    u, delta, A, B, C, D, z, delta_bias, seq, kept, gy, g_last, ends, sums, whole, carry, gu, g_delta, gz,
    gA, gB, gC, gD, g_bias, channels, length, width, blocks, maps, groups_B, groups_C, span, padded,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, gy_b, gy_d, gy_l, gu_b, gu_d, gu_l, seq_b, seq_l,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, LOG_T: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of u, delta and z, and for each program its part of those that are sums.

    `carry` (B, S, N, D) is where the gradient of the state waits, in the end that of the state before the span; `gA`
    (B, S, N, D) and `gD` and `g_bias` (B, S, D) are sums over tokens, `gB` and `gC` (programs, B, N, L) over channels.
    """
    dtype = carry.dtype.element_ty
    b, group, d, real = _place(channels, width, blocks, BLOCK_D)
    spans = tl.num_programs(1)
    s = tl.program_id(1)
    at_span = b * spans + s
    B += (b * groups_B + group * groups_B // maps) * padded * N
    C += (b * groups_C + group * groups_C // maps) * padded * N
    program = (tl.program_id(0) * tl.num_programs(2) + b) * N * padded
    carry += at_span * N * channels + d
    gA += at_span * N * channels + d
    kept += (b * (padded // T) + s * (span // T)) * N * channels + d
    if seq is not None:
        seq += b * seq_b
    bias = _vector(delta_bias, d, real, dtype, BLOCK_D)
    skip = _vector(D, d, real, dtype, BLOCK_D)
    for n in range(N):
        rate = tl.load(A + n * channels + d, mask=real, other=0.0)
        g_state = tl.zeros((BLOCK_D,), dtype)
        if g_last is not None:
            g_state = tl.load(g_last + (b * channels + d) * N + n, mask=real, other=0.0).to(dtype)
        for i in range(spans - 1 - s):
            after = b * spans + spans - 1 - i
            total = tl.load(sums + after * channels + d, mask=real, other=0.0)
            end = tl.load(ends + (after * N + n) * channels + d, mask=real, other=0.0)
            g_state = tl.exp2(total * rate) * tl.load(whole + after) * g_state + end
        tl.store(carry + n * channels, g_state, mask=real)
    sum_D = tl.zeros((BLOCK_D,), dtype)
    sum_bias = tl.zeros((BLOCK_D,), dtype)
    for back in range(span // T):
        c = span // T - 1 - back
        start = tl.full((), s * span + c * T, tl.int64)
        token = (start + tl.arange(0, T))[:, None]
        mask = real[None, :] & (token < length)
        x_TD = _load(u, u_b, u_l, u_d, b, token, d, mask, dtype)
        g_TD = _load(gy, gy_b, gy_l, gy_d, b, token, d, mask, dtype)
        step_TD = _step_sizes(delta, delta_b, delta_l, delta_d, b, token, d, mask, bias, SOFTPLUS, dtype)
        if z is not None:
            gate = _load(z, z_b, z_l, z_d, b, token, d, mask, dtype)
            g_TD *= gate * sigmoid(gate)
        steps = _rows(step_TD, T, LOG_T, BLOCK_D)
        scaled = _rows(step_TD * x_TD, T, LOG_T, BLOCK_D)
        g_read = _rows(g_TD, T, LOG_T, BLOCK_D)
        going_on = ()
        read = ()
        g_scaled = ()
        g_log = ()
        for t in tl.static_range(T):
            if seq is not None:
                going_on = going_on + (tl.where(_begins(seq, start + t, length, seq_l), 0.0, 1.0),)
            if z is not None:
                read = read + (tl.zeros((BLOCK_D,), dtype),)
            g_scaled = g_scaled + (tl.zeros((BLOCK_D,), dtype),)
            g_log = g_log + (tl.zeros((BLOCK_D,), dtype),)
        for n in range(N):
            rate = tl.load(A + n * channels + d, mask=real, other=0.0)
            state = tl.load(kept + (c * N + n) * channels, mask=real, other=0.0)
            g_state = tl.load(carry + n * channels, mask=real, other=0.0)
            g_rate = tl.load(gA + n * channels, mask=real & (back > 0), other=0.0)
            decays = ()
            states = (state,)
            parts = ()
            new_read = ()
            for t in tl.static_range(T):
                decay = tl.exp2(steps[t] * rate)
                if seq is not None:
                    decay *= going_on[t]
                state = decay * state + tl.load(B + (start + t) * N + n) * scaled[t]
                decays = decays + (decay,)
                states = states + (state,)
                parts = parts + (g_read[t] * state,)
                if z is not None:
                    new_read = new_read + (read[t] + tl.load(C + (start + t) * N + n) * state,)
            read = new_read
            to = program + n * padded + start
            _store_sums(gC + to, _tile(parts, T, LOG_T, BLOCK_D), T, BLOCK_D, BY_DOT)
            parts = ()
            new_scaled = ()
            new_log = ()
            for t in tl.static_range(T - 1, -1, -1):
                g_state += tl.load(C + (start + t) * N + n) * g_read[t]
                parts = (g_state * scaled[t],) + parts
                new_scaled = (g_scaled[t] + tl.load(B + (start + t) * N + n) * g_state,) + new_scaled
                g_state *= decays[t]
                g_decay = g_state * states[t]
                new_log = (g_log[t] + g_decay * rate,) + new_log
                g_rate += g_decay * steps[t]
            g_scaled = new_scaled
            g_log = new_log
            tl.store(carry + n * channels, g_state, mask=real)
            tl.store(gA + n * channels, g_rate, mask=real)
            _store_sums(gB + to, _tile(parts, T, LOG_T, BLOCK_D), T, BLOCK_D, BY_DOT)
        # Loaded again, not kept: registers are what limits this kernel.
        x_TD = _load(u, u_b, u_l, u_d, b, token, d, mask, dtype)
        g_TD = _load(gy, gy_b, gy_l, gy_d, b, token, d, mask, dtype)
        step_TD = _tile(steps, T, LOG_T, BLOCK_D)
        if z is not None:
            gate = _load(z, z_b, z_l, z_d, b, token, d, mask, dtype)
            gz_TD = g_TD * (_tile(read, T, LOG_T, BLOCK_D) + skip * x_TD) * silu_slope(gate)
            tl.store(gz + b * gu_b + token * gu_l + d[None, :] * gu_d, gz_TD.to(gz.dtype.element_ty), mask=mask)
            g_TD *= gate * sigmoid(gate)
        g_scaled_TD = _tile(g_scaled, T, LOG_T, BLOCK_D)
        g_step_TD = _tile(g_log, T, LOG_T, BLOCK_D) * LN_2 + g_scaled_TD * x_TD
        if SOFTPLUS:
            # The slope of softplus is the sigmoid, which is 1 - exp(-softplus).
            g_step_TD *= 1.0 - tl.exp2(step_TD * -LOG2_E)
        sum_bias += tl.sum(tl.where(mask, g_step_TD, 0.0), axis=0)
        sum_D += tl.sum(g_TD * x_TD, axis=0)
        at = b * gu_b + token * gu_l + d[None, :] * gu_d
        tl.store(g_delta + at, g_step_TD.to(g_delta.dtype.element_ty), mask=mask)
        tl.store(gu + at, (g_scaled_TD * step_TD + skip * g_TD).to(gu.dtype.element_ty), mask=mask)
    tl.store(gD + at_span * channels + d, sum_D, mask=real)
    tl.store(g_bias + at_span * channels + d, sum_bias, mask=real)
