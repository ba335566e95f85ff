"""SSD over all chunks of all sequences at once (arXiv 2405.21060, listing 1): the form for devices with many cores.

The form for a CPU (`chunked.py`) walks from chunk to chunk so that its working set stays in cache; on a GPU the same
walk would be thousands of launches of tiny kernels. Here every step is one batched product, and the states between
chunks are a product with the matrix of decays between chunk ends. The decays inside chunks, (B, L/Q, H, Q, Q), are
computed again in the backward pass, so a layer keeps only its inputs. In half precision the products take
half-precision factors, while decays, states and sums are float32.

Legend: B batch, C chunks, L length, H heads, K heads of a group, P head width, G groups, N state size, Q tokens of a
chunk.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import document_numbers
from bimamba_lit.kernels.recompute import recompute
from bimamba_lit.kernels.ssd.naive import accumulator, step_size

CHUNK = 64
# A decay below e^-60 forgets all that a float can tell; bounded totals keep the digits of their differences.
LOWEST_LOG_DECAY = -60.0


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
    documents = None if seq_idx is None else document_numbers(seq_idx)
    chunk = min(chunk_size, CHUNK, x.shape[1])
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    y, states = recompute(_ssd, *inputs, dt_softplus, dt_limit, documents, chunk)
    return (y, states) if return_final_states else y


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], documents: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = accumulator(x)
    dt = step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    log_decay = (dt * A.to(wide)).clamp(min=LOWEST_LOG_DECAY)
    y, states = _scan(x, dt, log_decay, B, C, initial, documents, chunk)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * x.to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), states


def _scan(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, documents: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    wide, narrow = accumulator(x), x.dtype
    if initial is None:
        initial = x.new_zeros(batch, heads, width, size, dtype=wide)
    scaled = _chunks(x.to(wide) * dt[..., None], chunk).unflatten(3, (groups, -1))  # B C Q G K P
    B_BCGQN, C_BCGQN = (_chunks(t, chunk).transpose(2, 3).to(narrow) for t in (B, C))
    total = _chunks(log_decay / math.log(2.0), chunk).cumsum(2).movedim(2, 3).unflatten(2, (groups, -1))  # B C G K Q
    same = None if documents is None else _Documents(documents, chunk)

    product = C_BCGQN @ B_BCGQN.transpose(-1, -2)
    mix = _between(total, None if same is None else same.inside) * product[:, :, :, None]
    values = scaled.permute(0, 1, 3, 4, 2, 5)  # B C G K Q P
    y = (mix.to(narrow) @ values.to(narrow)).to(wide)

    to_end, from_start = (total[..., -1:] - total).exp2(), total.exp2()
    if same is not None:
        to_end, from_start = to_end * same.to_end, from_start * same.from_start
    written = (values * to_end[..., None]).to(narrow).transpose(-1, -2) @ B_BCGQN[:, :, :, None]  # B C G K P N
    before, last = _pass_on(written.to(wide), initial.to(wide).unflatten(1, (groups, -1)), total[..., -1], same)
    read = C_BCGQN[:, :, :, None] @ before.to(narrow).transpose(-1, -2)
    y = y + read.to(wide) * from_start[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]
    return y, last.flatten(1, 2)


class _Documents:
    """Where tokens, chunks and the states between them belong to one document; shapes broadcast over heads."""

    def __init__(self, documents: Tensor, chunk: int) -> None:
        padding = -documents.shape[1] % chunk
        documents = torch.cat([documents, documents[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, chunk))
        ends = torch.cat([documents[:, :1, 0], documents[:, :, -1]], dim=1)
        self.inside = (documents[..., None] == documents[..., None, :])[:, :, None, None]
        self.to_end = (documents == ends[:, 1:, None])[:, :, None, None]
        self.from_start = (documents == ends[:, :-1, None])[:, :, None, None]
        self.ends = (ends[..., None] == ends[:, None, :])[:, None, None]


def _chunks(t: Tensor, chunk: int) -> Tensor:
    """(B, L, ...) -> (B, C, Q, ...), filled up with zeros: no input, and no decay."""
    padding = -t.shape[1] % chunk
    if padding:
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding))
    return t.unflatten(1, (-1, chunk))


def _between(total: Tensor, same: Tensor | None) -> Tensor:
    """(..., T) running totals -> (..., T, T): the decay from token j to token i, zero where i < j."""
    rows = torch.arange(total.shape[-1], device=total.device)
    allowed = rows[:, None] >= rows
    if same is not None:
        allowed = allowed & same
    return (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -math.inf).exp2()


def _pass_on(written: Tensor, initial: Tensor, whole: Tensor, same: _Documents | None) -> tuple[Tensor, Tensor]:
    """Return the states before every chunk (B, C, G, K, P, N) and after the last (B, G, K, P, N)."""
    states = torch.cat([initial[:, None], written], dim=1).permute(0, 2, 3, 1, 4, 5)  # B G K C+1 P N
    total = F.pad(whole.clamp(min=LOWEST_LOG_DECAY / math.log(2.0)).permute(0, 2, 3, 1).cumsum(-1), (1, 0))
    decay = _between(total, None if same is None else same.ends)
    passed = (decay @ states.flatten(4)).unflatten(4, states.shape[4:])
    return passed[:, :, :, :-1].permute(0, 3, 1, 2, 4, 5), passed[:, :, :, -1]
