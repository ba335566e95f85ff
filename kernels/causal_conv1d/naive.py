"""Causal depthwise convolution, one output at a time: the definition that every other form is held to.

Legend: B batch, D channels, L length, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Advance one token: x (B, D), the W-1 inputs before it (B, D, W-1) -> (y (B, D), the new W-1 inputs)."""
    window = torch.cat([conv_state.to(x.dtype), x[..., None]], dim=-1)
    return _apply(window, weight, bias, activation).to(x.dtype), window[..., 1:]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute y[t] = act(bias + sum_w weight[w] x[t - (W-1) + w]), with inputs of other documents taken as zero."""
    batch, channels, length = x.shape
    taps = weight.shape[1]
    if initial_states is None:
        initial_states = x.new_zeros(batch, channels, taps - 1)
    inputs = torch.cat([initial_states.to(x.dtype), x], dim=-1)
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
    documents = document_numbers(seq_idx)
    documents = torch.cat([documents[:, :1].expand(-1, taps - 1), documents], dim=1)
    ys = []
    for t in range(length):
        same = documents[:, t : t + taps] == documents[:, t + taps - 1, None]
        ys.append(_apply(inputs[..., t : t + taps] * same[:, None], weight, bias, activation))
    y = torch.stack(ys, dim=-1).to(x.dtype)
    if not return_final_states:
        return y
    same = documents[:, length:] == documents[:, -1:]
    return y, inputs[..., length:] * same[:, None]


def document_numbers(seq_idx: Tensor) -> Tensor:
    """Number the runs of equal values along the last dimension from 0: a value used again is a new document."""
    changed = seq_idx[..., 1:] != seq_idx[..., :-1]
    return F.pad(changed.to(torch.int64).cumsum(-1), (1, 0))


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which inputs such as `x` are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _apply(window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = (window.to(accumulator(window)) * weight.to(accumulator(window))).sum(-1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if activation is None else F.silu(y)
