"""The selective scan as its recurrence, one token at a time: the definition that every other form is held to.

Legend: B batch, D channels, L length, G groups (each serves D/G channels), N state size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import accumulator


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Return the step sizes of `delta` (B, D) or (B, D, L), in float32 (float64 for float64): bias, then softplus."""
    delta = delta.to(accumulator(delta))
    if delta_bias is not None:
        bias = delta_bias.to(delta.dtype)
        delta = delta + (bias if delta.ndim == 2 else bias[:, None])
    return F.softplus(delta) if delta_softplus else delta


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
    """Advance one token: state (B, D, N), u, delta and z (B, D), B and C (B, N) or (B, G, N) -> (y, new state)."""
    wide = accumulator(u)
    delta = step_size(delta.to(wide), delta_bias, delta_softplus)
    u_wide = u.to(wide)
    decay = torch.exp(delta[..., None] * A.to(wide))
    state = decay * state.to(wide) + (delta * u_wide)[..., None] * per_channel(B, u.shape[1]).to(wide)
    y = (state * per_channel(C, u.shape[1]).to(wide)).sum(-1)
    if D is not None:
        y = y + D.to(wide) * u_wide
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), state


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
    """Walk the recurrence of arXiv 2312.00752, algorithm 2, with `selective_scan_step`."""
    batch, channels, length = u.shape
    state = initial_states
    if state is None:
        state = u.new_zeros(batch, channels, A.shape[1], dtype=accumulator(u))
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        z_t = None if z is None else z[..., t]
        y, state = selective_scan_step(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z_t, delta_bias, delta_softplus
        )
        ys.append(y)
    y = torch.stack(ys, dim=-1)
    return (y, state) if return_last_state else y


def per_channel(maps: Tensor, channels: int) -> Tensor:
    """Return input or output maps (B, N) or (B, G, N) of one token as (B, 1 or D, N)."""
    return maps.unsqueeze(1) if maps.ndim == 2 else maps.repeat_interleave(channels // maps.shape[1], dim=1)
