"""The scans, the convolution and the norm of a deployed model, in code that ``torch.jit.script`` compiles.

The package's own ops choose a backend, record gradients and know documents, none of which a script can hold. These do
the one thing a deployed model needs: continue from a state, in float32, over plain tensor operations. Tests hold them
to :mod:`bimamba_lit.ops`.

Legend: B batch, L length, H heads, K heads of a group, P head width, G groups, N state size, E channels, W taps, C
chunks, Q tokens of a chunk.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``, a mean a group of features; x (..., D)."""
    if groups == 1:
        return torch.rms_norm(x, weight.shape, weight, eps)
    parts = x.view(x.shape[:-1] + (groups, x.shape[-1] // groups))
    return torch.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight


def causal_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve x (B, L, E) after its past (B, W-1, E) with weight (W, E), then SiLU: (B, L, E)."""
    window = torch.cat([past, x], 1)
    past.copy_(window[:, x.shape[1] :])
    y = F.conv1d(window.transpose(1, 2), weight.t().unsqueeze(1), bias, groups=weight.shape[1])
    return F.silu(y.transpose(1, 2))


def causal_conv_step(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do what `causal_conv` does for one token, x (B, E)."""
    window = torch.cat([past, x.unsqueeze(1)], 1)
    past.copy_(window[:, 1:])
    return F.silu((window * weight).sum(1) + bias)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Run Mamba-2's scan over all chunks at once (arXiv 2405.21060, listing 1).

    Args:
        x: Inputs (B, L, H, P).
        dt: Step sizes (B, L, H), after bias and softplus.
        A: Decay rates (H,), negative.
        B: Input maps (B, L, G, N).
        C: Output maps (B, L, G, N).
        state: (B, H, P, N), overwritten.

    Returns:
        y (B, L, H, P).
    """
    length, width, groups, size = x.shape[1], x.shape[3], B.shape[2], B.shape[3]
    lowest = -60.0 / math.log(2.0)  # of log2 decays: forgets all that a float can tell
    decays = (dt * (A / math.log(2.0))).clamp(min=lowest)
    total = _chunks(decays.unflatten(2, [groups, -1])).cumsum(2).permute(0, 1, 3, 4, 2)  # B C G K Q
    values = _chunks((x * dt.unsqueeze(-1)).unflatten(2, [groups, -1])).permute(0, 1, 3, 4, 2, 5)  # B C G K Q P
    keys = _chunks(B).transpose(2, 3).unsqueeze(3)  # B C G 1 Q N
    queries = _chunks(C).transpose(2, 3).unsqueeze(3)

    mix = _decay_between(total) * (queries @ keys.transpose(-1, -2))
    y = mix @ values
    written = (values * (total[..., -1:] - total).exp2().unsqueeze(-1)).transpose(-1, -2) @ keys  # B C G K P N
    states = torch.cat([state.unflatten(1, [groups, -1]).unsqueeze(1), written], 1).permute(0, 2, 3, 1, 4, 5).flatten(4)
    ends = F.pad(total[..., -1].clamp(min=lowest).permute(0, 2, 3, 1).cumsum(-1), [1, 0])
    passed = (_decay_between(ends) @ states).unflatten(-1, [width, size])  # B G K C+1 P N
    before = passed[:, :, :, :-1].permute(0, 3, 1, 2, 4, 5)
    y = y + (queries @ before.transpose(-1, -2)) * total.exp2().unsqueeze(-1)
    state.copy_(passed[:, :, :, -1].flatten(1, 2))
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)[:, :length]


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Do what `ssd` does for one token, x (B, H, P), dt (B, H), B and C (B, G, N), in the state given."""
    groups, size = B.shape[1], B.shape[2]
    state.mul_((dt * A).exp().unsqueeze(-1).unsqueeze(-1))
    rows = state.view(-1, x.shape[1] // groups * x.shape[2], size)  # B*G, K*P, N
    written = (x * dt.unsqueeze(-1)).reshape(rows.shape[0], -1, 1)
    rows.baddbmm_(written, B.reshape(-1, 1, size))
    return torch.bmm(rows, C.reshape(-1, size, 1)).view(x.shape)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Run Mamba-1's scan (arXiv 2312.00752, algorithm 2), token by token inside chunks whose decays are formed at once.

    Args:
        u: Inputs (B, L, E).
        delta: Step sizes (B, L, E), after bias and softplus.
        A: Decay rates (E, N), negative.
        B: Input maps (B, L, N).
        C: Output maps (B, L, N).
        state: (B, E, N), overwritten.

    Returns:
        y (B, L, E).
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _exported_selective_scan(u, delta, A, B, C, state)
    ys: list[Tensor] = []
    last = state
    for start in range(0, u.shape[1], 16):
        some = slice(start, start + 16)
        step = delta[:, some].unsqueeze(-1)
        decay = (step * A).exp()
        states = step * u[:, some].unsqueeze(-1) * B[:, some].unsqueeze(2)  # B Q E N
        for t in range(states.shape[1]):
            last = states[:, t].addcmul_(decay[:, t], last)
        ys.append((states @ C[:, some].unsqueeze(-1)).squeeze(-1))
    state.copy_(last)
    return torch.cat(ys, 1)


def _exported_selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Do what `selective_scan` does with the loop that ``torch.export`` keeps as one, for any length."""
    from torch._higher_order_ops.scan import scan

    def add(state: Tensor, token: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        state = token[0] * state + token[1]
        return state, state.clone()

    step = delta.unsqueeze(-1)
    decay, written = (step * A).exp(), step * u.unsqueeze(-1) * B.unsqueeze(2)
    last, states = scan(add, state, (decay.transpose(0, 1), written.transpose(0, 1)))
    state.copy_(last)
    return (states.transpose(0, 1) @ C.unsqueeze(-1)).squeeze(-1)


def selective_scan_step(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Do what `selective_scan` does for one token, u and delta (B, E), B and C (B, N), in the state given."""
    step = delta.unsqueeze(-1)
    state.mul_((step * A).exp()).addcmul_(step * u.unsqueeze(-1), B.unsqueeze(1))
    return torch.bmm(state, C.unsqueeze(-1)).squeeze(-1)


def _chunks(t: Tensor) -> Tensor:
    """(B, L, ...) -> (B, C, Q, ...), filled up with zeros: no input, and no decay."""
    chunk = 64
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        chunk = max(1, min(chunk, t.shape[1]))
        count = (t.shape[1] + chunk - 1) // chunk
    else:  # torch.export would take a count that can be one for always one, or for never
        count = (t.shape[1] + chunk - 1) // chunk + 1
    padding = [0] * (2 * (t.dim() - 2)) + [0, count * chunk - t.shape[1]]
    return F.pad(t, padding).reshape([t.shape[0], count, chunk] + list(t.shape[2:]))


def _decay_between(total: Tensor) -> Tensor:
    """(..., T) running totals of log2 decays -> (..., T, T): the decay from token j to token i, zero where i < j."""
    count = total.shape[-1]
    later = torch.ones(count, count, dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -math.inf).exp2()
