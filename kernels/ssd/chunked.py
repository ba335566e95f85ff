"""SSD in chunks of matrix products (arXiv 2405.21060, section 6), written for a CPU's caches.

The backward pass is written by hand. Autograd on the chunked form keeps (L/Q, H, Q, Q) decays and (L, H, P)
intermediates of the whole batch and streams each of them through memory several times; here one chunk of one sequence
is worked on at a time, so that its decays, its products and the running state stay in cache, and the backward pass
computes them again from the inputs. Only the states between chunks are kept, (B, L/Q, H, P, N) in the inputs' dtype,
which is what their products take; the running state and all decays are float32. Products
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
TILE = 1 << 17  # decays inside a chunk, of all heads, that are worked on at a time
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

    def between(self, rows: slice, c: int, tokens: int) -> Tensor:
        """Return (n, H, Q, Q): the decay from token j to token i of a chunk, zero where i < j."""
        bias = self.bias[:tokens, :tokens]
        if self.documents is not None:
            documents = self.documents[rows, c, None, :tokens]
            bias = bias + _log(documents[..., :, None] == documents[..., None, :], bias.dtype)
        total = self.total_BCHQ[rows, c, :, :tokens]
        return (total[..., :, None] - total[..., None, :]).add_(bias).exp2_()


def _log(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(allowed, 0.0, -math.inf).to(dtype)


def _together(batch: int, heads: int, chunk: int) -> list[slice]:
    """Return the sequences worked on at a time: few enough for the caches, many enough for all cores."""
    step = max(1, TILE // (heads * chunk * chunk))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


class _Maps:
    """B and C of a chunk as (n * G, Q, N), for the products that all heads of a group share."""

    def __init__(self, B: Tensor, C: Tensor, rows: slice, span: slice) -> None:
        self.B = B[rows, span].transpose(1, 2).flatten(0, 1)
        self.C = C[rows, span].transpose(1, 2).flatten(0, 1)
        self.groups = B.shape[2]

    def product(self, dtype: torch.dtype) -> Tensor:
        """Return C B^T (n, G, 1, Q, Q)."""
        return torch.bmm(self.C, self.B.transpose(1, 2)).to(dtype).unflatten(0, (-1, self.groups)).unsqueeze(2)

    def grouped(self, t_nQHP: Tensor) -> Tensor:
        """(n, Q, H, P) -> (n * G, Q, H/G * P) in the dtype of the maps."""
        t = t_nQHP.to(self.B.dtype).flatten(2).unflatten(2, (self.groups, -1))
        return t.transpose(1, 2).flatten(0, 1)

    def by_head(self, t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """(n * G, Q, H/G * P) -> (n, Q, H, P) in `dtype`."""
        return t.to(dtype).unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2).unflatten(2, (-1, width))

    def states(self, s: Tensor) -> Tensor:
        """(n, H, P, N) -> (n * G, H/G * P, N) in the dtype of the maps."""
        return s.to(self.B.dtype).flatten(1, 2).unflatten(1, (self.groups, -1)).flatten(0, 1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` in place; factors in half precision are summed to a wider total."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _dot(left: Tensor, right_nHPN: Tensor) -> Tensor:
    """Return the sum over P and N of the products of two states, (n, H)."""
    heads = right_nHPN.shape[:2]
    return torch.bmm(left.reshape(heads.numel(), 1, -1), right_nHPN.reshape(heads.numel(), -1, 1)).view(heads)


def _heads_first(t_nQHP: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, Q, H, P) -> (n * H, Q, P) in `dtype`."""
    return t_nQHP.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _forward(
    x: Tensor, dt: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
    states: Tensor | None, final: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batch, _, heads, width = x.shape
    size = B.shape[3]
    wide, narrow = dt.dtype, x.dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    ends = torch.empty(batch, heads, width, size, dtype=wide, device=x.device) if final else None
    for rows in _together(batch, heads, decays.chunk):
        s = None if initial is None else initial[rows].to(wide, copy=True)
        for c in range(decays.count):
            span = decays.span(c)
            tokens = span.stop - span.start
            s_narrow = None if s is None else s.to(narrow)
            if states is not None and s_narrow is not None:
                states[rows, c] = s_narrow
            maps = _Maps(B, C, rows, span)
            x_nQHP = x[rows, span].to(wide)
            scaled = x_nQHP * dt[rows, span, :, None]
            mix = decays.between(rows, c, tokens)
            mix.unflatten(1, (maps.groups, -1)).mul_(maps.product(wide))
            y_nHQP = torch.bmm(mix.to(narrow).flatten(0, 1), _heads_first(scaled, narrow)).unflatten(0, (-1, heads))
            y_nQHP = y_nHQP.to(wide).transpose(1, 2)
            if s_narrow is not None:
                read = maps.by_head(torch.bmm(maps.C, maps.states(s_narrow).transpose(1, 2)), width, wide)
                y_nQHP.addcmul_(read, decays.from_start[rows, c, :tokens, :, None])
            if D is not None:
                y_nQHP.addcmul_(x_nQHP, D)
            y[rows, span] = y_nQHP
            if final or c + 1 < decays.count:
                scaled *= decays.to_end[rows, c, :tokens, :, None]
                written = maps.grouped(scaled).transpose(1, 2)
                if s is None:
                    s = torch.bmm(written, maps.B).to(wide).view(-1, heads, width, size)
                else:
                    s *= decays.whole[rows, c, :, None, None]
                    _add_product(s.view(-1, written.shape[1], size), written, maps.B)
        if ends is not None and s is not None:
            ends[rows] = s
    return y, ends


def _backward(
    gy: Tensor, g_end: Tensor | None, x: Tensor, dt: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None,
    states: Tensor, first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, dt, the log decays, B, C, D and the initial states.

    `first` is the first chunk with a state before it: 0 where initial states were given, else 1.
    """
    batch, _, heads, width = x.shape
    wide, narrow = dt.dtype, x.dtype
    gx, gdt, gB, gC = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(B), torch.empty_like(C)
    gD = None if D is None else torch.zeros_like(D)
    g_initial = None if first else dt.new_zeros(states[:, 0].shape)
    upto = torch.zeros_like(decays.total_BCHQ)  # gradients of the logs of decays that end at a token
    since = torch.zeros_like(decays.from_start)  # of those that begin after it
    through = torch.zeros_like(decays.whole)  # of those that span the chunk
    for rows in _together(batch, heads, decays.chunk):
        gs = None if g_end is None else g_end[rows].to(wide, copy=True)
        for c in reversed(range(decays.count)):
            span = decays.span(c)
            tokens = span.stop - span.start
            maps = _Maps(B, C, rows, span)
            x_nQHP = x[rows, span].to(wide)
            gy_nQHP = gy[rows, span].to(wide)
            dt_nQH1 = dt[rows, span, :, None]
            scaled = x_nQHP * dt_nQH1
            gy_heads = _heads_first(gy_nQHP, narrow)

            mix = decays.between(rows, c, tokens)
            by_group = mix.unflatten(1, (maps.groups, -1))
            g_mix = torch.bmm(gy_heads, _heads_first(scaled, narrow).transpose(1, 2)).to(wide).view(by_group.shape)
            g_mix *= by_group
            product = maps.product(wide)
            by_group *= product
            g_scaled = torch.bmm(mix.to(narrow).flatten(0, 1).transpose(1, 2), gy_heads).unflatten(0, (-1, heads))
            g_scaled = g_scaled.transpose(1, 2).to(wide)
            g_product = g_mix.sum(2).to(narrow).flatten(0, 1)
            g_C = torch.bmm(g_product, maps.B).to(wide)
            g_B = torch.bmm(g_product.transpose(1, 2), maps.C).to(wide)
            # A token's own term does not decay: without the diagonal, nothing large has to cancel.
            g_log = g_mix.mul_(product.tril(-1)).flatten(1, 2)
            torch.sub(g_log.sum(3), g_log.sum(2), out=upto[rows, c, :, :tokens])

            s = states[rows, c] if c >= first else None
            if gs is not None:
                to_end = decays.to_end[rows, c, :tokens, :, None]
                into = maps.states(gs)
                g_written = maps.by_head(torch.bmm(maps.B, into.transpose(1, 2)), width, wide) * to_end
                g_scaled += g_written
                torch.sum(g_written.mul_(scaled), -1, out=since[rows, c, :tokens])
                _add_product(g_B, maps.grouped(scaled.mul_(to_end)), into)
                if s is not None:
                    through[rows, c] = _dot(into, s)
                    gs *= decays.whole[rows, c, :, None, None]
            if s is not None:
                g_read = gy_nQHP * decays.from_start[rows, c, :tokens, :, None]
                g_keys = torch.bmm(_heads_first(g_read, narrow), s.flatten(0, 1)).to(wide)
                g_keys = g_keys.unflatten(0, (-1, heads // maps.groups))  # n * G, K, Q, N
                g_C += g_keys.sum(1)
                g_keys *= maps.C[:, None]
                upto[rows, c, :, :tokens] += g_keys.sum(-1).view(-1, heads, tokens)
                read = maps.grouped(g_read).transpose(1, 2)
                if gs is None:
                    gs = torch.bmm(read, maps.C).to(wide).view(-1, *s.shape[1:])
                else:
                    _add_product(gs.view(-1, read.shape[1], s.shape[-1]), read, maps.C)

            torch.sum(g_scaled * x_nQHP, -1, out=gdt[rows, span])
            g_scaled *= dt_nQH1
            if D is not None and gD is not None:
                g_scaled.addcmul_(gy_nQHP, D)
                gD += (gy_nQHP * x_nQHP).sum((0, 1))
            gx[rows, span] = g_scaled
            gB[rows, span] = g_B.unflatten(0, (-1, maps.groups)).transpose(1, 2)
            gC[rows, span] = g_C.unflatten(0, (-1, maps.groups)).transpose(1, 2)
        if g_initial is not None and gs is not None:
            g_initial[rows] = gs
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
        states = x.new_empty(x.shape[0], decays.count, *x.shape[2:], B.shape[-1])
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
