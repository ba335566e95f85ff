"""Gated RMS norm on tiles of tokens that fit in cache, forward and backward by hand.

Autograd would keep the gate, its product and the normed values, each as large as the input in float32, and stream every
one through memory. Here a tile's values stay in cache, the backward pass computes them again from the inputs, and only
one number a token and group is kept beside them.

Legend: T tokens (of a tile: R), D features, G groups.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.causal_conv1d.naive import accumulator
from bimamba_lit.kernels.rms_norm import naive

TILE = 1 << 18  # elements
FEW = 1 << 14  # elements of a decoded token or a few, for which starting an operation costs more than running it


def _tiles(tokens: int, features: int) -> Iterator[slice]:
    step = max(1, TILE // features)
    yield from (slice(start, start + step) for start in range(0, tokens, step))


def _gated(x_RD: Tensor, z_RD: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return the gated values and the gate's factor, both (R, D)."""
    if z_RD is None:
        return x_RD.to(wide, copy=True), None
    gate = F.silu(z_RD.to(wide))
    return x_RD * gate, gate


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, groups: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.groups = groups
        y, scale_TG = _forward(x, weight, z, eps, groups, dtype)
        ctx.save_for_backward(x, weight, z, scale_TG)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, scale_TG = ctx.saved_tensors
        gx, gw, gz = _backward(gy, x, weight, z, scale_TG, ctx.groups)
        return gx, gw, gz, None, None, None


def _forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = accumulator(x)
    features = x.shape[-1]
    x_TD, z_TD = x.reshape(-1, features), None if z is None else z.reshape(-1, features)
    weight = weight.to(wide)
    y_TD = torch.empty(x_TD.shape, dtype=dtype, device=x.device)
    scale_TG = torch.empty(x_TD.shape[0], groups, 1, dtype=wide, device=x.device)
    for rows in _tiles(*x_TD.shape):
        v, _ = _gated(x_TD[rows], None if z_TD is None else z_TD[rows], wide)
        v_RGD = v.unflatten(1, (groups, -1))
        size = torch.linalg.vector_norm(v_RGD, dim=2, keepdim=True)
        torch.rsqrt(size.square_().div_(v_RGD.shape[2]).add_(eps), out=scale_TG[rows])
        v_RGD *= scale_TG[rows]
        torch.mul(v, weight, out=y_TD[rows])
    return y_TD.view(x.shape), scale_TG


def _of_few(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    wide = accumulator(x)
    v = x.to(wide)
    if z is not None:
        v = v * F.silu(z.to(wide))
    if groups == 1:
        return F.rms_norm(v, v.shape[-1:], weight.to(wide), eps).to(dtype)
    v_GD = v.unflatten(-1, (groups, -1))
    return (F.rms_norm(v_GD, v_GD.shape[-1:], None, eps).flatten(-2) * weight.to(wide)).to(dtype)


def _backward(
    gy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, scale_TG: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    wide = accumulator(x)
    features = x.shape[-1]
    x_TD, gy_TD = x.reshape(-1, features), gy.reshape(-1, features)
    z_TD = None if z is None else z.reshape(-1, features)
    w = weight.to(wide)
    gx = torch.empty(x_TD.shape, dtype=x.dtype, device=x.device)
    gz = None if z is None else torch.empty(x_TD.shape, dtype=z.dtype, device=x.device)
    gw = torch.zeros_like(w)
    for rows in _tiles(*x_TD.shape):
        z_RD = None if z_TD is None else z_TD[rows].to(wide)
        v, gate = _gated(x_TD[rows], z_RD, wide)
        g = gy_TD[rows].to(wide) * w
        v_RGD, g_RGD = (t.unflatten(1, (groups, -1)) for t in (v, g))
        v_RGD *= scale_TG[rows]
        gw += (gy_TD[rows] * v).sum(0)
        # The part of the gradient along the normed values changes only their size, which the norm undoes.
        along = (g_RGD * v_RGD).mean(2, keepdim=True)
        g_RGD.addcmul_(v_RGD, along, value=-1).mul_(scale_TG[rows])
        if gate is None or z_RD is None or gz is None:
            gx[rows] = g
        else:
            torch.mul(g, gate, out=gx[rows])
            gz[rows] = torch.ops.aten.silu_backward(g.mul_(x_TD[rows]), z_RD)
    return gx.view(x.shape), gw.to(weight.dtype), None if gz is None or z is None else gz.view(z.shape)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute what `naive.rms_norm` computes."""
    dtype = dtype or x.dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, z)):
        y: Tensor = _RMSNorm.apply(x, weight, z, eps, groups, dtype)
        return y
    if x.numel() <= FEW:
        return _of_few(x, weight, z, eps, groups, dtype)
    return _forward(x, weight, z, eps, groups, dtype)[0]


norm_and_residual = partial(naive.norm_and_residual, norm=rms_norm)
