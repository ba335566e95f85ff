"""SSD in chunks of matrix products (arXiv 2405.21060, section 6), written for a CPU's caches.

The backward pass is written by hand. Autograd on the chunked form keeps (L/Q, H, Q, Q) decays and (L, H, P)
intermediates of the whole batch and streams each of them through memory several times; here one chunk of one sequence
is worked on at a time, so that its decays, its products and the running state stay in cache, and the backward pass
computes them again from the inputs. Only the states between chunks are kept, (B, L/Q, H, P, N) in float32. Products
that all heads of a group share (C B^T, and everything with a state) are one matrix product a group.

A chunk of 64 does the least work: the work on states does not depend on the chunk Q, that inside chunks grows with it.
Decays are exponentials of differences that are at most 0 for A < 0, with -inf where no token may look, so nothing
overflows, and no gradient is formed from an overflow times zero.

Legend: B batch, L length, H heads, P head width, G groups (each serves H/G heads), N state size, Q tokens of a chunk.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.causal_conv1d.naive import document_numbers
from bimamba_lit.kernels.ssd.naive import accumulator, step_size
from bimamba_lit.kernels.ssd.naive import ssd_step as naive_step

CHUNK = 64
# A token whose decay is below e^-60 forgets all that a float can tell. Without this bound a few huge steps would make
# the running total so large that the differences between its later entries lose their digits.
LOWEST_LOG_DECAY = -60.0


class Decays:
    """What is known of every chunk before any product: decays between tokens, into the state and out of it.

    Each is zero where a document ends between the two ends of the decay.
    """

    def __init__(self, log_decay: Tensor, chunk: int, documents: Tensor | None) -> None:
        self.length = log_decay.shape[1]
        self.chunk = chunk
        self.count = math.ceil(self.length / chunk)
        padding = self.count * chunk - self.length
        total = F.pad(log_decay / math.log(2.0), (0, 0, 0, padding)).unflatten(1, (self.count, chunk)).cumsum(2)
        self.total_BCHQ = total.transpose(2, 3).contiguous()
        self.from_start = total.exp2()
        self.to_end = (total[:, :, -1:] - total).exp2()
        self.whole = total[:, :, -1].exp2()
        rows = torch.arange(chunk, device=log_decay.device)
        self.bias = _log(rows[:, None] >= rows, log_decay.dtype)
        self.documents = documents
        if documents is not None:
            documents = F.pad(documents[:, None].float(), (0, padding), mode="replicate")[:, 0]
            self.documents = documents = documents.unflatten(1, (self.count, chunk))
            before = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], dim=1)
            last = documents[:, :, -1]
            self.from_start = self.from_start * (documents == before[:, :, None])[..., None]
            self.to_end = self.to_end * (documents == last[:, :, None])[..., None]
            self.whole = self.whole * (before == last)[..., None]

    def span(self, c: int) -> slice:
        """Return the tokens of chunk `c`."""
        return slice(c * self.chunk, min((c + 1) * self.chunk, self.length))

    def between(self, b: int, c: int, tokens: int) -> Tensor:
        """Return (H, Q, Q): the decay from token j to token i of a chunk, zero where i < j."""
        bias = self.bias[:tokens, :tokens]
        if self.documents is not None:
            documents = self.documents[b, c, :tokens]
            bias = bias + _log(documents[:, None] == documents, bias.dtype)
        total = self.total_BCHQ[b, c, :, :tokens]
        return (total[:, :, None] - total[:, None, :]).add_(bias).exp2_()


def _log(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(allowed, 0.0, -math.inf).to(dtype)


def _forward(
    x: Tensor, dt: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    states: Tensor | None, final: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batch, _, heads, width = x.shape
    groups, size = B.shape[2:]
    wide = dt.dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    ends = torch.empty(batch, heads, width, size, dtype=wide, device=x.device) if final else None
    for b in range(batch):
        s = None if state is None else state[b].to(wide, copy=True)
        for c in range(decays.count):
            span = decays.span(c)
            tokens = span.stop - span.start
            if states is not None and s is not None:
                states[b, c] = s
            x_QHP = x[b, span].to(wide)
            B_GQN = B[b, span].to(wide).transpose(0, 1)
            C_GQN = C[b, span].to(wide).transpose(0, 1)
            scaled = x_QHP * dt[b, span, :, None]
            mix = decays.between(b, c, tokens).unflatten(0, (groups, -1))
            mix *= torch.bmm(C_GQN, B_GQN.transpose(1, 2))[:, None]
            y_QHP = torch.bmm(mix.flatten(0, 1), scaled.transpose(0, 1)).transpose(0, 1)
            if s is not None:
                read = torch.bmm(C_GQN, s.view(groups, -1, size).transpose(1, 2))
                y_QHP = y_QHP.addcmul_(_heads(read, width), decays.from_start[b, c, :tokens, :, None])
            if D is not None:
                y_QHP.addcmul_(x_QHP, D)
            y[b, span] = y_QHP
            if final or c + 1 < decays.count:
                scaled *= decays.to_end[b, c, :tokens, :, None]
                written = _grouped(scaled, groups).transpose(1, 2)
                if s is None:
                    s = torch.bmm(written, B_GQN).view(heads, width, size)
                else:
                    s *= decays.whole[b, c, :, None, None]
                    s.view(groups, -1, size).baddbmm_(written, B_GQN)
        if ends is not None and s is not None:
            ends[b] = s
    return y, ends


def _grouped(t_QHP: Tensor, groups: int) -> Tensor:
    """(Q, H, P) -> (G, Q, H/G * P), a view."""
    return t_QHP.flatten(1).unflatten(1, (groups, -1)).transpose(0, 1)


def _heads(t_GQX: Tensor, width: int) -> Tensor:
    """(G, Q, H/G * P) -> (Q, H, P), a view for one group."""
    return t_GQX.transpose(0, 1).flatten(1).unflatten(1, (-1, width))


def _backward(
    gy: Tensor, g_end: Tensor | None, x: Tensor, dt: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None,
    states: Tensor, first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, dt, the log decays, B, C, D and the initial states.

    `first` is the first chunk with a state before it: 0 where initial states were given, else 1.
    """
    batch, _, heads, width = x.shape
    groups, size = B.shape[2:]
    wide = dt.dtype
    gx, gdt, gB, gC = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(B), torch.empty_like(C)
    gD = None if D is None else torch.zeros_like(D)
    g_initial = None if first else torch.zeros_like(states[:, 0])
    upto = torch.zeros_like(decays.total_BCHQ)  # gradients of the logs of decays that end at a token
    since = torch.zeros_like(decays.from_start)  # of those that begin after it
    through = torch.zeros_like(decays.whole)  # of those that span the chunk
    for b in range(batch):
        gs = None if g_end is None else g_end[b].to(wide, copy=True)
        for c in reversed(range(decays.count)):
            span = decays.span(c)
            tokens = span.stop - span.start
            x_QHP = x[b, span].to(wide)
            gy_QHP = gy[b, span].to(wide)
            B_GQN = B[b, span].to(wide).transpose(0, 1)
            C_GQN = C[b, span].to(wide).transpose(0, 1)
            dt_QH1 = dt[b, span, :, None]
            scaled = x_QHP * dt_QH1
            gy_HQP = gy_QHP.transpose(0, 1)

            between = decays.between(b, c, tokens)
            g_mix = torch.bmm(gy_HQP, scaled.permute(1, 2, 0)).mul_(between).unflatten(0, (groups, -1))
            product = torch.bmm(C_GQN, B_GQN.transpose(1, 2))
            between.unflatten(0, (groups, -1)).mul_(product[:, None])
            g_scaled = torch.bmm(between.transpose(1, 2), gy_HQP).transpose(0, 1)
            g_product = g_mix.sum(1)
            gC_GQN = torch.bmm(g_product, B_GQN)
            gB_GQN = torch.bmm(g_product.transpose(1, 2), C_GQN)
            # A token's own term does not decay: without the diagonal, nothing large has to cancel.
            g_log = g_mix.mul_(product.tril(-1)[:, None]).flatten(0, 1)
            torch.sub(g_log.sum(2), g_log.sum(1), out=upto[b, c, :, :tokens])

            s = states[b, c] if c >= first else None
            if gs is not None:
                to_end = decays.to_end[b, c, :tokens, :, None]
                g_written = _heads(torch.bmm(B_GQN, gs.view(groups, -1, size).transpose(1, 2)), width) * to_end
                g_scaled += g_written
                torch.sum(g_written.mul_(scaled), -1, out=since[b, c, :tokens])
                gB_GQN.baddbmm_(_grouped(scaled.mul_(to_end), groups), gs.view(groups, -1, size))
                if s is not None:
                    torch.sum((gs * s).flatten(1), -1, out=through[b, c])
                    gs *= decays.whole[b, c, :, None, None]
            if s is not None:
                g_read = gy_QHP * decays.from_start[b, c, :tokens, :, None]
                g_keys = torch.bmm(g_read.transpose(0, 1), s).unflatten(0, (groups, -1))
                gC_GQN += g_keys.sum(1)
                upto[b, c, :, :tokens] += g_keys.mul_(C_GQN[:, None]).sum(-1).flatten(0, 1)
                read = _grouped(g_read, groups).transpose(1, 2)
                if gs is None:
                    gs = torch.bmm(read, C_GQN).view(heads, width, size)
                else:
                    gs.view(groups, -1, size).baddbmm_(read, C_GQN)

            torch.sum(g_scaled * x_QHP, -1, out=gdt[b, span])
            gx_QHP = g_scaled.mul_(dt_QH1)
            if D is not None and gD is not None:
                gx_QHP.addcmul_(gy_QHP, D)
                gD += (gy_QHP * x_QHP).sum(0)
            gx[b, span] = gx_QHP
            gB[b, span] = gB_GQN.transpose(0, 1)
            gC[b, span] = gC_GQN.transpose(0, 1)
        if g_initial is not None and gs is not None:
            g_initial[b] = gs
    g_log_decay = upto.flip(3).cumsum(3).flip(3).transpose(2, 3) + (through * decays.whole)[:, :, None]
    g_log_decay[:, :, 1:] += since.cumsum(2)[:, :, :-1]
    return gx, gdt, g_log_decay.flatten(1, 2)[:, : decays.length], gB, gC, gD, g_initial


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        initial: Tensor | None, documents: Tensor | None, chunk: int, final: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        decays = Decays(log_decay, chunk, documents)
        states = dt.new_empty(x.shape[0], decays.count, *x.shape[2:], B.shape[-1])
        y, end = _forward(x, dt, decays, B, C, D, initial, states, final, dtype)
        ctx.save_for_backward(x, dt, log_decay, B, C, D, documents, states)
        ctx.chunk = chunk
        ctx.first = 1 if initial is None else 0
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, g_end: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, log_decay, B, C, D, documents, states = ctx.saved_tensors
        if gy is None:
            gy = torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            decays = Decays(log_decay, ctx.chunk, documents)
            *grads, g_initial = _backward(gy, g_end, x, dt, decays, B, C, D, states, ctx.first)
        if g_initial is not None:
            g_initial = g_initial.to(ctx.initial_dtype)
        return *grads, g_initial, None, None, None, None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `naive.ssd` computes; `chunk_size` is a ceiling, and chunks longer than `CHUNK` are never taken."""
    wide = accumulator(x)
    dt = step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    log_decay = (dt * A.to(wide)).clamp(min=LOWEST_LOG_DECAY)
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None].expand(-1, x.shape[-1])).to(wide)
    documents = None if seq_idx is None else document_numbers(seq_idx)
    chunk = min(chunk_size, CHUNK, x.shape[1])
    dtype = x.dtype if z is None else wide
    inputs = (x, dt, log_decay, B, C, D, initial_states)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, states = _Scan.apply(*inputs, documents, chunk, return_final_states, dtype)
    else:
        decays = Decays(log_decay, chunk, documents)
        y, states = _forward(x, dt, decays, B, C, D, initial_states, None, return_final_states, dtype)
    if z is not None:
        y = (y * F.silu(z.to(wide))).to(x.dtype)
    return (y, states) if return_final_states else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Compute what `naive.ssd_step` computes; while no gradients are recorded, in the state given."""
    if torch.is_grad_enabled():
        return naive_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    wide = accumulator(x)
    batch, groups, size = B.shape
    dt = step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    x_wide = x.to(wide)
    state = state.to(wide).contiguous()
    state *= torch.exp(dt * A.to(wide))[:, :, None, None]
    rows = state.view(batch, groups, -1, size)
    rows.addcmul_((dt[:, :, None] * x_wide).view(batch, groups, -1, 1), B.to(wide)[:, :, None, :])
    y = torch.matmul(rows, C.to(wide)[..., None]).view(x.shape)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * x_wide
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), state
