"""Causal depthwise convolution as W shifted multiply-adds on tiles that fit in cache, forward and backward by hand.

A grouped ``conv1d`` treats every channel by itself and is slowest in its backward pass. A shifted multiply-add is plain
vector work in whichever layout the inputs have; the mixer's, a (B, L, D) tensor seen as (B, D, L), has channels side by
side, is read in place and is the fastest one. Autograd would keep every shifted product; here the value before the
activation is computed again in the backward pass, and only the inputs are kept.

Legend: B batch, D channels, L length, W taps, T tokens of a tile. Inside this file time comes before channels.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.causal_conv1d import naive

TILE = 1 << 18  # elements, which keeps the few tiles in use at a time within a core's cache


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, same: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, past, same)
        ctx.silu = silu
        return _forward(x, weight, bias, silu, past, same)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gx, gw, gb, g_past = _backward(gy, *ctx.saved_tensors, silu=ctx.silu)
        return gx, gw, gb, None, g_past, None


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
    same = None
    if seq_idx is not None:
        documents = naive.document_numbers(seq_idx)
        documents = torch.cat([documents[:, :1].expand(-1, taps - 1), documents], dim=1)
        same = documents.unfold(1, taps, 1) == documents[:, taps - 1 :, None]
        same = same.to(naive.accumulator(x))
    inputs = (x, weight, bias, activation is not None, initial_states, same)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        y = _Conv.apply(*inputs)
    else:
        y = _forward(*inputs)
    if not return_final_states:
        return y
    states = x[..., max(x.shape[2] - taps + 1, 0) :]
    if states.shape[2] < taps - 1:
        missing = taps - 1 - states.shape[2]
        before = x.new_zeros(*x.shape[:2], missing) if initial_states is None else initial_states[..., -missing:]
        states = torch.cat([before.to(x.dtype), states], dim=2)
    if same is None:
        return y, states.clone()
    # Row -1 tells which inputs share the last token's document; its last column is the token itself.
    return y, states * _last_document(documents, taps)[:, None].to(x.dtype)


def _last_document(documents: Tensor, taps: int) -> Tensor:
    return documents[:, documents.shape[1] - taps + 1 :] == documents[:, -1:]


def _tiles(x: Tensor, past: Tensor | None, taps: int, reverse: bool = False) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield the sequence, the tokens and the inputs (W - 1 + T, D) of each tile, in time order or against it."""
    batch, channels, length = x.shape
    wide = naive.accumulator(x)
    step = max(TILE // channels, taps)
    starts = list(range(0, length, step))
    for b in range(batch):
        x_LD = x[b].t()
        for start in reversed(starts) if reverse else starts:
            span = slice(start, min(start + step, length))
            if start >= taps - 1:
                window = x_LD[start - taps + 1 : span.stop].to(wide)
            else:
                before = x_LD.new_zeros(taps - 1, channels) if past is None else past[b].t()
                window = _join(before.to(wide), x_LD[: span.stop].to(wide))
            yield b, span, window


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate along time, keeping time innermost where the larger one has it innermost."""
    larger = first if first.numel() >= second.numel() else second
    return torch.cat([first.t(), second.t()], dim=1).t() if larger.stride(0) == 1 else torch.cat([first, second])


def _before_activation(
    window: Tensor, weight_WD: Tensor, bias: Tensor | None, same_TW: Tensor | None, tokens: int
) -> Tensor:
    taps = weight_WD.shape[0]
    total = window[taps - 1 :] * weight_WD[-1]
    for w in range(taps - 1):
        shifted = window[w : w + tokens]
        total.addcmul_(shifted if same_TW is None else shifted * same_TW[:, w, None], weight_WD[w])
    return total if bias is None else total.add_(bias.to(total.dtype))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, same: Tensor | None
) -> Tensor:
    weight_WD = weight.to(naive.accumulator(x)).t().contiguous()
    y = torch.empty_like(x)
    for b, span, window in _tiles(x, past, weight.shape[1]):
        same_TW = None if same is None else same[b, span]
        total = _before_activation(window, weight_WD, bias, same_TW, span.stop - span.start)
        y[b, :, span] = (F.silu(total, inplace=True) if silu else total).t()
    return y


def _backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, same: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    taps = weight.shape[1]
    batch, channels, length = x.shape
    taps = weight.shape[1]
    weight_WD = weight.to(naive.accumulator(x)).t().contiguous()
    gx = torch.empty_like(x)
    gw_WD = torch.zeros_like(weight_WD)
    gb = torch.zeros_like(weight_WD[0])
    g_past = None if past is None else torch.zeros(batch, taps - 1, channels, dtype=gb.dtype, device=x.device)
    same = None if same is None else F.pad(same, (0, 0, 0, taps - 1))
    # The gradient before the activation, of a tile and of the W - 1 tokens after it; tiles come last first.
    g = gb.new_zeros(taps - 1, channels)
    for b, span, window in _tiles(x, past, taps, reverse=True):
        tokens = span.stop - span.start
        after = g[: taps - 1] if span.stop < length else torch.zeros_like(g[: taps - 1])
        g_tile = gy[b, :, span].t().to(gb.dtype)
        if silu:
            same_TW = None if same is None else same[b, span]
            g_tile = torch.ops.aten.silu_backward(g_tile, _before_activation(window, weight_WD, bias, same_TW, tokens))
        g = _join(g_tile, after)
        gx_tile = torch.zeros_like(g_tile)
        for w in range(taps):
            ahead = taps - 1 - w
            seen = None if same is None else same[b, span.start : span.start + tokens + taps - 1, w, None]
            g_w = g if seen is None else g * seen
            gx_tile.addcmul_(g_w[ahead : ahead + tokens], weight_WD[w])
            gw_WD[w] += (g_w[:tokens] * window[w : w + tokens]).sum(0)
            if g_past is not None and span.start == 0:
                g_past[b, w:] += g_w[:ahead] * weight_WD[w]
        gb += g_tile.sum(0)
        gx[b, :, span] = gx_tile.t()
    gw = gw_WD.t().to(weight.dtype)
    return gx, gw, None if bias is None else gb.to(bias.dtype), _cast_past(g_past, past)


def _cast_past(g_past: Tensor | None, past: Tensor | None) -> Tensor | None:
    return None if g_past is None or past is None else g_past.transpose(1, 2).to(past.dtype)
