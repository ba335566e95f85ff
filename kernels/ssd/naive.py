"""SSD as its recurrence, one token at a time: the definition that every other form is held to.

Legend: B batch, L length, H heads, P head width, G groups (each serves H/G heads), N state size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """Return the step sizes (..., H) in float32 (float64 for float64): bias, softplus, then clamp to the limits.

    A step size on a limit keeps its gradient, as in mamba_ssm; `Tensor.clamp` has had none there since torch 2.14.
    """
    dt = dt.to(accumulator(dt))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    low, high = dt_limit
    if dt_softplus and low <= 0 and high == math.inf:  # all are within, and decoding has no time for more operations
        return dt
    return torch.where((dt < low) | (dt > high), dt.detach().clamp(low, high), dt)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which states and decays are held for inputs such as `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    """Advance one token: state (B, H, P, N), x and z (B, H, P), dt (B, H), B and C (B, G, N) -> (y, new state)."""
    wide = accumulator(x)
    per_group = x.shape[1] // B.shape[1]
    dt = step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    B_bhn = B.to(wide).repeat_interleave(per_group, dim=1)
    C_bhn = C.to(wide).repeat_interleave(per_group, dim=1)
    decay = torch.exp(dt * A.to(wide))[:, :, None, None]
    x_wide = x.to(wide)
    state = decay * state.to(wide) + (dt[:, :, None] * x_wide)[..., None] * B_bhn[:, :, None, :]
    y = (state * C_bhn[:, :, None, :]).sum(-1)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * x_wide
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), state


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
    """Walk the recurrence of arXiv 2405.21060, eq. 2, with `ssd_step`; `chunk_size` plays no part."""
    batch, length, heads, width = x.shape
    state = initial_states
    if state is None:
        state = x.new_zeros(batch, heads, width, B.shape[-1], dtype=accumulator(x))
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        z_t = None if z is None else z[:, t]
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z_t, dt_bias, dt_softplus, dt_limit)
        ys.append(y)
    y = torch.stack(ys, dim=1)
    return (y, state) if return_final_states else y
