"""Causal depthwise convolution on whole tensors: the form for devices with many cores.

The tiles of `chunked.py` fit a CPU's caches; on a GPU they would be many launches of small kernels. Here each tap is
one multiply-add over the whole batch, computed again in the backward pass, so that only the inputs are kept.

Legend: B batch, D channels, L length, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import accumulator, document_numbers
from bimamba_lit.kernels.recompute import recompute


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `naive.causal_conv1d` computes."""
    taps = weight.shape[1]
    past = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states.to(x.dtype)
    same = None
    if seq_idx is not None:
        documents = document_numbers(seq_idx)
        documents = torch.cat([documents[:, :1].expand(-1, taps - 1), documents], dim=1)
        same = (documents.unfold(1, taps, 1) == documents[:, taps - 1 :, None]).to(accumulator(x))
    y = recompute(_convolve, x, weight, bias, activation is not None, past, same)
    if not return_final_states:
        return y
    inputs = torch.cat([past, x], dim=2)[..., x.shape[2] :]
    return y, inputs if same is None else inputs * (documents[:, x.shape[2] :] == documents[:, -1:])[:, None]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor, same: Tensor | None) -> Tensor:
    length = x.shape[2]
    wide = accumulator(x)
    window = torch.cat([past.transpose(1, 2), x.transpose(1, 2)], dim=1)
    total = None if bias is None else bias.to(wide)
    for w, tap in enumerate(weight.to(wide).unbind(1)):
        term = window[:, w : w + length].to(wide) * tap
        term = term if same is None else term * same[:, :, w, None]
        total = term if total is None else total + term
    assert total is not None
    return (F.silu(total) if silu else total).to(x.dtype).transpose(1, 2)
