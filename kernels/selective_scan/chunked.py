"""The selective scan in chunks that stay in cache, forward and backward by hand.

The state has N entries a channel and a decay of its own for every one of them, so there is no product of matrices as in
SSD; the cost is exponentials and memory. A chunk of tokens is worked on at a time: decays and what is written to the
state are formed for the whole chunk in large vector operations, the recurrence is then one fused multiply-add a token
over all sequences, and what is read from the states is a batched product again. The state size comes before the
channels, so every operation runs over contiguous channels. Autograd would keep (B, L, D, N) decays, writes and states;
here the backward pass computes them again from the states between chunks, (L/Q, B, D, N) in float32.

Nothing overflows for A < 0: decays are computed one token at a time and never divided by.

Legend: B batch, D channels, L length, G groups, N state size, Q tokens of a chunk; R = B * G rows that share B and C,
P = D/G channels of a row. Inside this file time comes first.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.autocast import without_autocast
from bimamba_lit.kernels.causal_conv1d.naive import accumulator
from bimamba_lit.kernels.selective_scan.naive import per_channel, step_size
from bimamba_lit.kernels.selective_scan.naive import selective_scan_step as naive_step

CHUNK_ELEMENTS = 1 << 19  # elements of the states of a chunk, of which there are three arrays in use at a time
# A state is kept for every chunk, so chunks are never very short, whatever the cache.
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64
_LOG2_E = 1 / math.log(2.0)


class _Chunks:
    """The inputs in float32 or float64, time first, and the arrays that every chunk is worked on in."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, starts: Tensor | None
    ) -> None:
        batch, channels, self.length = u.shape
        self.size = A.shape[1]
        self.groups = math.lcm(*(maps.shape[1] if maps.ndim == 4 else 1 for maps in (B, C)))
        self.rows, self.width = batch * self.groups, channels // self.groups
        wide = accumulator(u)
        self.u = self.time_first(u.to(wide))
        self.delta = self.time_first(delta.to(wide))
        self.B, self.C = self._maps(B.to(wide)), self._maps(C.to(wide))
        self.A = self.state_first(A.to(wide)[None]).repeat(batch, 1, 1)
        # exp2 is several times as fast as exp on a CPU.
        self.log2_decay = self.A * _LOG2_E
        self.D = None if D is None else D.to(wide)
        self.starts = None if starts is None else starts.repeat_interleave(self.groups, dim=1)
        in_cache = CHUNK_ELEMENTS // max(1, self.A.numel())
        self.chunk = min(self.length, LONGEST_CHUNK, max(SHORTEST_CHUNK, in_cache))
        self.count = math.ceil(self.length / self.chunk)
        shape = (self.chunk, self.rows, self.size, self.width)
        self.decay_ = self.u.new_empty(shape)
        # One more than a chunk: the first is the state before it.
        self.states_ = self.u.new_empty(self.chunk + 1, *shape[1:])

    def span(self, c: int) -> slice:
        """Return the tokens of chunk `c`."""
        return slice(c * self.chunk, min((c + 1) * self.chunk, self.length))

    def time_first(self, t_BDL: Tensor) -> Tensor:
        """(B, D, L) -> (L, R, P)."""
        return t_BDL.permute(2, 0, 1).contiguous().view(self.length, self.rows, self.width)

    def channels_first(self, t_LRP: Tensor) -> Tensor:
        """(L, R, P) -> (B, D, L), with the channels of a token side by side in memory."""
        t_LBD = t_LRP.view(self.length, self.rows // self.groups, -1)
        return t_LBD.transpose(0, 1).contiguous().transpose(1, 2)

    def state_first(self, t_BDN: Tensor) -> Tensor:
        """(B, D, N) -> (R, N, P)."""
        return t_BDN.unflatten(1, (self.groups, -1)).transpose(2, 3).flatten(0, 1).contiguous()

    def state_last(self, t_RNP: Tensor) -> Tensor:
        """(R, N, P) -> (B, D, N)."""
        return t_RNP.unflatten(0, (-1, self.groups)).transpose(2, 3).flatten(1, 2)

    def _maps(self, maps: Tensor) -> Tensor:
        """(B, N, L) or (B, G, N, L) -> (L, R, N)."""
        maps = maps[:, None] if maps.ndim == 3 else maps
        maps = maps.repeat_interleave(self.groups // maps.shape[1], dim=1)
        return maps.permute(3, 0, 1, 2).flatten(1, 2).contiguous()

    def map_gradient(self, g_LRN: Tensor, like: Tensor) -> Tensor:
        """(L, R, N) -> the shape of `like`, summed over the rows that share a map."""
        g_BGNL = g_LRN.unflatten(1, (-1, self.groups)).permute(1, 2, 3, 0)
        if like.ndim == 3:
            return g_BGNL.sum(1).to(like.dtype)
        return g_BGNL.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)

    def run(self, span: slice, state: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decays (Q, R, N, P) of a chunk and the states (Q + 1, R, N, P) before and after its tokens."""
        tokens = span.stop - span.start
        decay, states = self.decay_[:tokens], self.states_[: tokens + 1]
        torch.mul(self.delta[span].unsqueeze(2), self.log2_decay, out=decay)
        decay.exp2_()
        if self.starts is not None:
            decay[self.starts[span]] = 0.0
        states[0] = state
        torch.mul(self.B[span].unsqueeze(3), scaled.unsqueeze(2), out=states[1:])
        each = states.unbind()
        for before, after, kept in zip(each, each[1:], decay.unbind(), strict=False):
            after.addcmul_(before, kept)
        return decay, states


def _forward(chunks: _Chunks, state: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y (L, R, P) and the last state; write the state before each chunk to `kept`."""
    y = torch.empty_like(chunks.u)
    for c in range(chunks.count):
        span = chunks.span(c)
        if kept is not None:
            kept[c] = state
        _, states = chunks.run(span, state, chunks.delta[span] * chunks.u[span])
        torch.bmm(_flat(chunks.C[span].unsqueeze(2)), _flat(states[1:]), out=_flat(y[span].unsqueeze(2)))
        state = states[-1].clone()
    if chunks.D is not None:
        y.addcmul_(chunks.u, chunks.D.view(chunks.groups, -1).repeat(chunks.rows // chunks.groups, 1))
    return y, state


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def _backward(
    chunks: _Chunks, gy: Tensor, g_state: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u (without that of the skip), delta, A (R, N, P), B, C and the initial state."""
    gu, g_delta = torch.empty_like(chunks.u), torch.empty_like(chunks.u)
    gB, gC = torch.empty_like(chunks.B), torch.empty_like(chunks.C)
    gA = torch.zeros_like(chunks.A)
    g_states_ = torch.empty_like(chunks.decay_)
    carry = torch.zeros_like(gA) if g_state is None else g_state
    for c in reversed(range(chunks.count)):
        span = chunks.span(c)
        u, delta, gy_c = chunks.u[span], chunks.delta[span], gy[span]
        scaled = delta * u
        decay, states = chunks.run(span, kept[c], scaled)
        g_states = g_states_[: len(u)]
        torch.bmm(_flat(gy_c.unsqueeze(2)), _flat(states[1:]).transpose(1, 2), out=_flat(gC[span].unsqueeze(2)))

        torch.mul(chunks.C[span].unsqueeze(3), gy_c.unsqueeze(2), out=g_states)
        each, decays = g_states.unbind(), decay.unbind()
        each[-1].add_(carry)
        for t in reversed(range(1, len(u))):
            each[t - 1].addcmul_(each[t], decays[t])
        carry = each[0] * decays[0]

        g_scaled = torch.bmm(_flat(chunks.B[span].unsqueeze(2)), _flat(g_states)).view_as(u)
        torch.bmm(_flat(scaled.unsqueeze(2)), _flat(g_states).transpose(1, 2), out=_flat(gB[span].unsqueeze(2)))
        torch.mul(g_scaled, delta, out=gu[span])
        g_log = decay.mul_(g_states).mul_(states[:-1])
        product = torch.mul(g_log, chunks.A, out=g_states)
        torch.sum(product, 2, out=g_delta[span])
        g_delta[span].addcmul_(g_scaled, u)
        gA += torch.mul(g_log, delta.unsqueeze(2), out=g_states).sum(0)
    return gu, g_delta, gA, gB, gC, carry


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
        starts: Tensor | None, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        chunks = _Chunks(u, delta, A, B, C, D, starts)
        kept = chunks.u.new_empty(chunks.count, *chunks.A.shape)
        y, state = _forward(chunks, _initial(chunks, initial), kept)
        ctx.save_for_backward(u, delta, A, B, C, D, starts, kept)
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return chunks.channels_first(y).to(dtype), chunks.state_last(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, g_state: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, starts, kept = ctx.saved_tensors
        with without_autocast(u):
            chunks = _Chunks(u, delta, A, B, C, D, starts)
            gy = torch.zeros_like(chunks.u) if gy is None else chunks.time_first(gy.to(chunks.u.dtype))
            last = None if g_state is None else chunks.state_first(g_state.to(gy.dtype))
            gu, g_delta, gA, gB, gC, g_initial = _backward(chunks, gy, last, kept)
            gD = None
            if chunks.D is not None:
                skip = chunks.D.view(chunks.groups, -1).repeat(chunks.rows // chunks.groups, 1)
                gu.addcmul_(gy, skip)
                gD = (gy * chunks.u).sum(0).view(-1, u.shape[1]).sum(0).to(D.dtype)
            return (
                chunks.channels_first(gu).to(u.dtype),
                chunks.channels_first(g_delta).to(delta.dtype),
                chunks.state_last(gA).sum(0).to(A.dtype),
                chunks.map_gradient(gB, B),
                chunks.map_gradient(gC, C),
                gD,
                None if ctx.initial_dtype is None else chunks.state_last(g_initial).to(ctx.initial_dtype),
                None,
                None,
            )


def _initial(chunks: _Chunks, initial: Tensor | None) -> Tensor:
    return torch.zeros_like(chunks.A) if initial is None else chunks.state_first(initial.to(chunks.A.dtype))


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
    wide = accumulator(u)
    delta = step_size(delta.to(wide), delta_bias, delta_softplus)
    starts = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).t()
    dtype = u.dtype if z is None else wide
    inputs = (u, delta, A, B, C, D, initial_states)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, state = _Scan.apply(*inputs, starts, dtype)
    else:
        chunks = _Chunks(u, delta, A, B, C, D, starts)
        y, state = _forward(chunks, _initial(chunks, initial_states), None)
        y, state = chunks.channels_first(y).to(dtype), chunks.state_last(state)
    if z is not None:
        y = (y * F.silu(z.to(wide))).to(u.dtype)
    return (y, state) if return_last_state else y


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
    wide = accumulator(u)
    batch, channels = u.shape
    delta = step_size(delta.to(wide), delta_bias, delta_softplus)
    u_wide = u.to(wide)
    state = state.to(wide).contiguous()
    state.mul_(torch.mul((delta * _LOG2_E).unsqueeze(-1), A.to(wide)).exp2_())
    state.addcmul_((delta * u_wide).unsqueeze(-1), per_channel(B, channels).to(wide))
    columns = C.to(wide).reshape(-1, C.shape[-1], 1)
    y = torch.bmm(state.view(columns.shape[0], -1, C.shape[-1]), columns).view(batch, channels)
    if D is not None:
        y.addcmul_(D.to(wide), u_wide)
    if z is not None:
        y.mul_(F.silu(z.to(wide)))
    return y.to(u.dtype), state
