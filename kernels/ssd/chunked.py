"""SSD in chunks of matrix products (arXiv 2405.21060, section 6), written for a CPU's caches.

The backward pass is written by hand. Autograd on the chunked form keeps (L/Q, H, Q, Q) decays and (L, H, P)
intermediates of the whole batch and streams each of them through memory several times; here a tile of a few chunks is
worked on at a time, so that its decays and products stay in cache, and the backward pass computes them again from the
inputs. Only the states between chunks are kept, (L/Q, B, H, P, N) in the inputs' dtype, which is what their products
take; the running state and all decays are float32, and half-precision factors are rounded once, where a product takes
them. Products that all heads of a group share (C B^T, and everything with a state) are one matrix product a group.

Inside a chunk, ``y = M x``, ``M = (C B^T) * W + diag(D)`` and ``W_ij`` is dt_j times the decay from token j to token i.
The step size is part of the exponent, so the inputs are never scaled. With ``F = dL/dM * (C B^T) * W``, a log decay
gets the sum of F over the pairs that it lies between, and ``log dt_j`` the sum of column j.

A chunk of 64 does the least work: the work on states does not depend on the chunk Q, that inside chunks grows with it.
Decays are exponentials of differences that are at most 0 for A < 0 wherever they count.

Legend: B batch, L length, H heads, P head width, G groups (each serves H/G heads), N state size, Q tokens of a chunk,
k chunks and n sequences of a tile; a tile's tensors have the chunk first, then the sequence.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.autocast import without_autocast
from bimamba_lit.kernels.causal_conv1d.naive import document_numbers
from bimamba_lit.kernels.ssd.naive import accumulator, step_size
from bimamba_lit.kernels.ssd.naive import ssd_step as naive_step

CHUNK = 64
TILE = 1 << 19  # decays inside chunks, of all heads, that are worked on at a time
# A token whose decay is below e^-60 forgets all that a float can tell. Without this bound a few huge steps would make
# the running total so large that the differences between its later entries lose their digits.
LOWEST_LOG_DECAY = -60.0
LOWEST_STEP = 1e-30  # has a logarithm, and writes nothing that a float can tell from a step of 0


class Decays:
    """What is known of every chunk before any product: decays between tokens, into the state and out of it.

    Those between tokens and those into the state include the step size of the token they start from. Each is zero where
    a document ends between its two ends.
    """

    def __init__(self, dt: Tensor, log_decay: Tensor, chunk: int, documents: Tensor | None) -> None:
        self.length = log_decay.shape[1]
        self.chunk = chunk
        self.count = math.ceil(self.length / chunk)
        padding = self.count * chunk - self.length
        dt, log_decay = (F.pad(t, (0, 0, 0, padding)).unflatten(1, (self.count, chunk)) for t in (dt, log_decay))
        total = (log_decay / math.log(2.0)).cumsum(2)
        self.dt = dt.clamp(min=LOWEST_STEP).permute(1, 0, 3, 2).contiguous()  # chunks, B, H, Q
        self.total = total.permute(1, 0, 3, 2).contiguous()
        self.origin = self.total - self.dt.log2()
        self.from_start = total.exp2().transpose(0, 1)  # chunks, B, Q, H
        self.to_end = (total[:, :, -1:] - total).exp2().transpose(0, 1)
        self.whole = total[:, :, -1].exp2().transpose(0, 1)  # chunks, B, H
        self.same = None
        if documents is not None:
            documents = F.pad(documents[:, None].float(), (0, padding), mode="replicate")[:, 0]
            documents = documents.unflatten(1, (self.count, chunk)).transpose(0, 1)
            self.same = documents[..., :, None] == documents[..., None, :]
            before = torch.cat([documents[:1, :, 0], documents[:-1, :, -1]])
            last = documents[:, :, -1]
            self.from_start = self.from_start * (documents == before[..., None])[..., None]
            self.to_end = self.to_end * (documents == last[..., None])[..., None]
            self.whole = self.whole * (before == last)[..., None]
        self.into_end = self.to_end * dt.transpose(0, 1)

    def weights(self, tile: "Tile", t: Tensor) -> Tensor:
        """(chunks, B, Q, H) -> (k, n, Q, H, 1)."""
        return tile.of(t)[:, :, : tile.tokens, :, None]

    def between(self, tile: "Tile") -> Tensor:
        """Return W (k, n, H, Q, Q), zero where i < j."""
        total, origin = (tile.of(t)[..., : tile.tokens] for t in (self.total, self.origin))
        # Above the diagonal the differences may overflow; tril_ sets zeros without reading.
        decay = torch.sub(total[..., :, None], origin[..., None, :]).exp2_().tril_()
        if self.same is not None:
            decay *= tile.of(self.same)[:, :, None, : tile.tokens, : tile.tokens]
        return decay


class Tile(NamedTuple):
    """Chunks of sequences that are worked on together, and what of them has to do with states.

    Attributes:
        rows: The sequences.
        chunks: The chunks.
        tokens: Tokens of each chunk.
        span: All their tokens.
        read: Those of the tile's chunks that have a state before them.
        write: Those whose state after them is needed.
    """

    rows: slice
    chunks: slice
    tokens: int
    span: slice
    read: slice
    write: slice

    def of(self, t: Tensor) -> Tensor:
        """(chunks, B, ...) -> a view (k, n, ...)."""
        return t[self.chunks, self.rows]

    def cut(self, t: Tensor) -> Tensor:
        """(B, L, ...) -> a view (k, n, Q, ...)."""
        return t[self.rows, self.span].unflatten(1, (-1, self.tokens)).transpose(0, 1)


def _tiles(batch: int, heads: int, decays: Decays, initial: bool, final: bool) -> Iterator[list[Tile]]:
    """Yield the tiles, in the order of time, of the sequences that are worked on together.

    A tile is small enough for the caches and large enough for all cores. A last chunk that is not whole is a tile.
    """
    chunk, count, length = decays.chunk, decays.count, decays.length
    room = max(1, TILE // (heads * chunk * chunk))
    sequences = min(room, batch)
    together = max(1, room // sequences)
    whole = length // chunk
    starts = [*range(0, whole, together), *([whole] if whole < count else [])]
    for row in range(0, batch, sequences):
        tiles = []
        for first, end in zip(starts, [*starts[1:], count], strict=True):
            span = slice(first * chunk, min(end * chunk, length))
            read = slice(0 if first or initial else 1, end - first)
            write = slice(0, end - first - (0 if final or end < count else 1))
            rows = slice(row, min(row + sequences, batch))
            tokens = (span.stop - span.start) // (end - first)
            tiles.append(Tile(rows, slice(first, end), tokens, span, read, write))
        yield tiles


class _Layout(NamedTuple):
    """The layouts that products take a tile's tensors in; `groups` heads share B and C.

    Two layouts: by head, (k * n * H, Q, P), and by group, (k, n * G, Q, H/G * P), the heads of a group side by side.
    """

    tile: Tile
    heads: int
    groups: int

    def maps(self, t: Tensor) -> Tensor:
        """B or C, (B, L, G, N) -> (k, n * G, Q, N)."""
        return self.tile.cut(t).transpose(2, 3).contiguous().flatten(1, 2)

    def from_maps(self, t: Tensor) -> Tensor:
        """(k, n * G, Q, N) -> (k, n, Q, G, N)."""
        return t.unflatten(1, (-1, self.groups)).transpose(2, 3)

    def states(self, t: Tensor) -> Tensor:
        """(k, n, H, P, N) -> (k, n * G, H/G * P, N)."""
        return t.flatten(2, 3).unflatten(2, (self.groups, -1)).flatten(1, 2)

    def from_states(self, t: Tensor) -> Tensor:
        """(k, n * G, H/G * P, N) -> (k, n, H, P, N)."""
        return t.unflatten(1, (-1, self.groups)).flatten(2, 3).unflatten(2, (self.heads, -1))

    def by_head(self, t: Tensor) -> Tensor:
        """(k, n, Q, H, P) -> (k * n * H, Q, P)."""
        return t.transpose(2, 3).contiguous().flatten(0, 2)

    def from_heads(self, t: Tensor) -> Tensor:
        """(k * n * H, Q, P) -> (k, n, Q, H, P)."""
        rows = self.tile.rows
        return t.unflatten(0, (-1, rows.stop - rows.start, self.heads)).transpose(2, 3)

    def by_group(self, t: Tensor) -> Tensor:
        """(k, n, Q, H, P) -> (k, n * G, Q, H/G * P)."""
        return t.flatten(3).unflatten(3, (self.groups, -1)).transpose(2, 3).flatten(1, 2)

    def from_groups(self, t: Tensor) -> Tensor:
        """(k, n * G, Q, H/G * P) -> (k, n, Q, H, P)."""
        return t.unflatten(1, (-1, self.groups)).transpose(2, 3).flatten(3).unflatten(3, (self.heads, -1))

    def per_group(self, t: Tensor) -> Tensor:
        """(k, n, H, Q, Q) -> (k, n * G, H/G, Q, Q)."""
        return t.unflatten(2, (self.groups, -1)).flatten(1, 2)


def _times(t: Tensor, weights: Tensor) -> Tensor:
    """Multiply in the dtype of `t`; the result lies in memory as its dimensions are, not as those of `t` do."""
    return torch.mul(t, weights.to(t.dtype), out=t.new_empty(t.shape))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices whose batch has two dimensions."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _forward(
    x: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, final: bool,
    states: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return y and, if wanted, the final states; fill `states` (chunks, B, H, P, N), those before each chunk."""
    batch, _, heads, width = x.shape
    groups, size = B.shape[2:]
    wide, narrow = decays.total.dtype, x.dtype
    y = x.new_empty(x.shape)
    ends = x.new_zeros(batch, heads, width, size, dtype=wide) if final else None
    for tiles in _tiles(batch, heads, decays, initial is not None, final):
        state = None if initial is None else initial[tiles[0].rows].to(wide)
        for tile in tiles:
            layout = _Layout(tile, heads, groups)
            x_, B_, C_ = tile.cut(x), layout.maps(B), layout.maps(C)
            mix = decays.between(tile)
            layout.per_group(mix).mul_(_product(C_, B_.transpose(2, 3)).unsqueeze(2))
            if D is not None:
                mix.diagonal(dim1=-2, dim2=-1).add_(D[:, None])
            y_ = layout.from_heads(torch.bmm(mix.to(narrow).flatten(0, 2), layout.by_head(x_)))

            weights = decays.weights(tile, decays.into_end)[tile.write]
            written = layout.by_group(_times(x_[tile.write], weights)).transpose(2, 3)
            added = layout.from_states(_product(written, B_[tile.write]))
            before = x.new_empty(*x_.shape[:2], heads, width, size) if states is None else tile.of(states)
            for j, whole in enumerate(tile.of(decays.whole)[..., None, None]):
                if state is not None:
                    before[j] = state
                if j < tile.write.stop:
                    state = added[j].to(wide) if state is None else torch.addcmul(added[j], state, whole)
            read = layout.from_groups(_product(C_[tile.read], layout.states(before[tile.read]).transpose(2, 3)))
            weights = decays.weights(tile, decays.from_start)[tile.read].to(narrow)
            out = tile.cut(y)
            out[: tile.read.start] = y_[: tile.read.start]
            torch.addcmul(y_[tile.read], read, weights, out=out[tile.read])
        if ends is not None and state is not None:
            ends[tiles[0].rows] = state
    return y, ends


def _backward(
    gy: Tensor, g_end: Tensor | None, x: Tensor, decays: Decays, B: Tensor, C: Tensor, D: Tensor | None,
    states: Tensor, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, dt, the log decays, B, C, D and, if there were any, the initial states."""
    batch, _, heads, width = x.shape
    groups = B.shape[2]
    wide, narrow = decays.total.dtype, x.dtype
    gx, gB, gC = x.new_empty(x.shape), torch.empty_like(B), torch.empty_like(C)
    gD = None if D is None else torch.zeros_like(D)
    g_initial = states.new_zeros(states.shape[1:], dtype=wide) if initial else None
    gdt = torch.zeros_like(decays.total)
    upto = torch.zeros_like(decays.total)  # gradients of the logs of decays that end at a token
    through = torch.zeros_like(decays.whole)  # of those that span a chunk
    for tiles in _tiles(batch, heads, decays, initial, g_end is not None):
        g_state = None if g_end is None else g_end[tiles[0].rows].to(wide)
        for tile in reversed(tiles):
            layout = _Layout(tile, heads, groups)
            x_, gy_, B_, C_ = tile.cut(x), tile.cut(gy), layout.maps(B), layout.maps(C)
            gy_heads = layout.by_head(gy_)

            decay = decays.between(tile)
            products = _product(C_, B_.transpose(2, 3)).to(wide).unsqueeze(2)
            g_mix = torch.bmm(gy_heads, layout.by_head(x_).transpose(1, 2)).to(wide).view(decay.shape)
            if gD is not None:
                gD += g_mix.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
            g_mix *= decay
            g_products = layout.per_group(g_mix).sum(2).to(narrow)
            layout.per_group(g_mix).mul_(products)
            # A token's own term does not decay: without the diagonal, nothing large has to cancel.
            diagonal = g_mix.diagonal(dim1=-2, dim2=-1)
            own = diagonal.clone()
            diagonal.zero_()
            columns = g_mix.sum(3)
            gdt_, upto_ = (tile.of(t)[..., : tile.tokens].transpose(2, 3) for t in (gdt, upto))
            gdt_.copy_(((columns + own) / tile.of(decays.dt)[..., : tile.tokens]).transpose(2, 3))
            upto_.copy_((g_mix.sum(4) - columns).transpose(2, 3))
            layout.per_group(decay).mul_(products)
            if D is not None:
                decay.diagonal(dim1=-2, dim2=-1).add_(D[:, None])
            gx_ = layout.from_heads(torch.bmm(decay.to(narrow).flatten(0, 2).transpose(1, 2), gy_heads))
            gB_ = _product(g_products.transpose(2, 3), C_).to(wide)
            gC_ = _product(g_products, B_).to(wide)

            before = tile.of(states)[tile.read]
            maps = layout.states(before)
            g_read = _times(gy_[tile.read], decays.weights(tile, decays.from_start)[tile.read])
            read = layout.from_groups(_product(C_[tile.read], maps.transpose(2, 3)))
            upto_[tile.read] += read.mul_(g_read).sum(-1, dtype=wide)
            g_read = layout.by_group(g_read)
            gC_[tile.read] += _product(g_read, maps)
            added = layout.from_states(_product(g_read.transpose(2, 3), C_[tile.read]))

            after = x.new_empty(tile.write.stop, gy_.shape[1], *states.shape[2:])
            for j, whole in reversed(list(enumerate(tile.of(decays.whole)[..., None, None]))):
                if j < tile.write.stop:
                    assert g_state is not None
                    after[j] = g_state
                if j >= tile.read.start:
                    new = added[j - tile.read.start]
                    g_state = new.to(wide) if g_state is None else torch.addcmul(new, g_state, whole)
            both = slice(tile.read.start, tile.write.stop)
            crossing = (after[both] * before[: both.stop - both.start]).sum(4).sum(3, dtype=wide)
            tile.of(through)[both] = crossing * tile.of(decays.whole)[both]

            maps = layout.states(after)
            g_written = layout.from_groups(_product(B_[tile.write], maps.transpose(2, 3)))
            weights = decays.weights(tile, decays.into_end)[tile.write]
            since = (g_written * x_[tile.write]).sum(-1, dtype=wide)
            gdt_[tile.write] += since * decays.weights(tile, decays.to_end)[tile.write, ..., 0]
            since *= weights[..., 0]
            upto_[tile.write] -= since
            tile.of(through)[tile.write] += since.sum(2)
            gB_[tile.write] += _product(layout.by_group(_times(x_[tile.write], weights)), maps)
            out = tile.cut(gx)
            torch.addcmul(gx_[tile.write], g_written, weights.to(narrow), out=out[tile.write])
            out[tile.write.stop :] = gx_[tile.write.stop :]
            tile.cut(gB).copy_(layout.from_maps(gB_))
            tile.cut(gC).copy_(layout.from_maps(gC_))
        if g_initial is not None and g_state is not None:
            g_initial[tiles[0].rows] = g_state
    g_log_decay = upto.flip(3).cumsum(3).flip(3) + through[..., None]
    gdt, g_log_decay = (
        t.permute(1, 0, 3, 2).flatten(1, 2)[:, : decays.length].contiguous() for t in (gdt, g_log_decay)
    )
    return gx, gdt, g_log_decay, gB, gC, gD, g_initial


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        initial: Tensor | None, documents: Tensor | None, chunk: int, final: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        decays = Decays(dt, log_decay, chunk, documents)
        states = x.new_empty(decays.count, x.shape[0], *x.shape[2:], B.shape[-1])
        y, end = _forward(x, decays, B, C, D, initial, final, states)
        ctx.save_for_backward(x, dt, log_decay, B, C, D, documents, states)
        ctx.chunk = chunk
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, g_end: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, log_decay, B, C, D, documents, states = ctx.saved_tensors
        if gy is None:
            gy = torch.zeros_like(x)
        with without_autocast(x):
            decays = Decays(dt, log_decay, ctx.chunk, documents)
            *grads, g_initial = _backward(gy, g_end, x, decays, B, C, D, states, ctx.initial_dtype is not None)
        if g_initial is not None:
            g_initial = g_initial.to(ctx.initial_dtype)
        return *grads, g_initial, None, None, None


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
    documents = None if seq_idx is None else document_numbers(seq_idx)
    chunk = min(chunk_size, CHUNK, x.shape[1])
    D_H = D.to(wide) if D is not None and D.ndim == 1 else None
    inputs = (x, dt, log_decay, B, C, D_H, initial_states)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, states = _Scan.apply(*inputs, documents, chunk, return_final_states)
    else:
        decays = Decays(dt, log_decay, chunk, documents)
        y, states = _forward(x, decays, B, C, D_H, initial_states, return_final_states, None)
    if D is not None and D.ndim == 2:
        y = y + D.to(x.dtype) * x
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
