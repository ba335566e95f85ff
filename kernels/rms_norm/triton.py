"""Gated RMS norm in Triton, as operations that torch.compile and autograd know.

A program takes whole groups of features, so a mean is taken without leaving it; the backward pass computes the gate and
the normed values again, and keeps one number a token and group. The gradient of the gains is summed by as many programs
as fill the device, and these sums are added afterwards in a fixed order.

Legend: T tokens, D features, G groups.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.causal_conv1d.naive import accumulator
from bimamba_lit.kernels.configurations import CompileCase, configuration, multiprocessors
from bimamba_lit.kernels.pointwise import sigmoid, silu_slope
from bimamba_lit.kernels.rms_norm import naive
from bimamba_lit.kernels.sums import sum_parts


def rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute what `naive.rms_norm` computes."""
    x_TD = x.reshape(-1, x.shape[-1])
    y: Tensor = _norm(x_TD, weight, None if z is None else z.reshape(x_TD.shape), eps, groups, dtype or x.dtype)[0]
    return y.view(x.shape)


def norm_and_residual(
    x: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `naive.norm_and_residual` computes; one kernel adds up the gradients of both."""
    if torch.compiler.is_compiling():  # which traces no function that returns what it is given
        return naive.norm_and_residual(x, weight, eps, dtype, norm=rms_norm)
    y, residual = _NormAndResidual.apply(x, weight, eps, dtype or x.dtype)
    return y, residual


@triton.jit
def norm_forward(
    x, weight, z, y, scale, tokens, width, eps, x_t, x_d, weight_d, z_t, z_d,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y (T, D) and the reciprocal root of the mean square (T, G)."""
    dtype = scale.dtype.element_ty
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = tl.arange(0, BLOCK_D)[None, :]
    feature = group * width + inside
    real = (row < tokens) & (inside < width)
    v = tl.load(x + row * x_t + feature * x_d, mask=real, other=0.0).to(dtype)
    if z is not None:
        gate = tl.load(z + row * z_t + feature * z_d, mask=real, other=0.0).to(dtype)
        v *= gate * sigmoid(gate)
    size = tl.sum(v * v, axis=1)[:, None] / width
    factor = 1.0 / tl.sqrt(size + eps)
    gain = tl.load(weight + feature * weight_d, mask=inside < width, other=0.0).to(dtype)
    tl.store(y + row * (width * groups) + feature, (v * factor * gain).to(y.dtype.element_ty), mask=real)
    tl.store(scale + row * groups + group, factor, mask=row < tokens)


@triton.jit
def norm_backward(
    x, weight, z, gy, scale, beside, gx, gz, gw, tokens, width, x_t, x_d, weight_d, z_t, z_d, gy_t, gy_d, beside_t,
    beside_d, gz_t,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr = 1,
):  # fmt: skip
    """Write the gradients of x, plus what is beside it, and z (T, D), and a part of the gains' (programs, D)."""
    dtype = scale.dtype.element_ty
    group, groups = tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK_D)[None, :]
    feature = group * width + inside
    gain = tl.load(weight + feature * weight_d, mask=inside < width, other=0.0).to(dtype)
    g_gain = tl.zeros((ROWS, BLOCK_D), dtype)
    for first in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        real = (row < tokens) & (inside < width)
        value = tl.load(x + row * x_t + feature * x_d, mask=real, other=0.0).to(dtype)
        g = tl.load(gy + row * gy_t + feature * gy_d, mask=real, other=0.0).to(dtype)
        factor = tl.load(scale + row * groups + group, mask=row < tokens, other=0.0)
        v = value
        if z is not None:
            gate = tl.load(z + row * z_t + feature * z_d, mask=real, other=0.0).to(dtype)
            v = value * gate * sigmoid(gate)
        normal = v * factor
        g_gain += g * normal
        g *= gain
        g = factor * (g - normal * (tl.sum(g * normal, axis=1)[:, None] / width))
        if z is not None:
            tl.store(gz + row * gz_t + feature, (g * value * silu_slope(gate)).to(gz.dtype.element_ty), mask=real)
            g *= gate * sigmoid(gate)
        if beside is not None:
            g += tl.load(beside + row * beside_t + feature * beside_d, mask=real, other=0.0).to(dtype)
        tl.store(gx + row * (width * groups) + feature, g.to(gx.dtype.element_ty), mask=real)
    total = tl.sum(g_gain, axis=0)[None, :]
    tl.store(gw + tl.program_id(0) * (width * groups) + feature, total, mask=inside < width)


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


@torch.library.custom_op("bimamba_lit::rms_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return forward(x, weight, z, eps, groups, dtype)


@_norm.register_fake
def _(x, weight, z, eps, groups, dtype):
    return _outputs(x, groups, dtype)


def _outputs(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], groups, dtype=accumulator(x))


def _launch(kernel: str, x: Tensor, width: int) -> dict[str, int]:
    return {"BLOCK_D": triton.next_power_of_2(width), **configuration(kernel, x.dtype, width, x.device).launch()}


def forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) in `dtype`, and the reciprocal root of the mean square (T, G)."""
    tokens, width = x.shape[0], x.shape[1] // groups
    y, scale = _outputs(x, groups, dtype)
    if tokens:
        launch = _launch("rms_norm/forward", x, width)
        norm_forward[(math.ceil(tokens / launch["ROWS"]), groups)](
            x, weight, z, y, scale, tokens, width, eps, *x.stride(), *weight.stride(), *_strides(z), **launch
        )
    return y, scale


@torch.library.custom_op("bimamba_lit::rms_norm_backward", mutates_args=())
def _norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, scale: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(gy, x, weight, z, scale, _gate_gradient(x, z), beside)


@_norm_backward.register_fake
def _(gy, x, weight, z, scale, beside):
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return gx, _gate_gradient(x, z), torch.empty_like(weight, dtype=scale.dtype)


def _gate_gradient(x: Tensor, z: Tensor | None) -> Tensor:
    return x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, scale: Tensor, gz: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of z in `gz`, whose features lie side by side, and of the gains.

    What `beside` holds (T, D) is added to the gradient of x.
    """
    tokens, groups = scale.shape
    width = x.shape[1] // groups
    launch = _launch("rms_norm/backward", x, width)
    programs = min(max(1, math.ceil(tokens / launch["ROWS"])), launch.pop("WAVES") * multiprocessors(x.device))
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gw = x.new_empty(programs, x.shape[1], dtype=scale.dtype)
    norm_backward[(programs, groups)](
        x, weight, z, gy, scale, beside, gx, gz, gw, tokens, width, *x.stride(), *weight.stride(), *_strides(z),
        *gy.stride(), *_strides(beside), gz.stride(0), **launch,
    )  # fmt: skip
    return gx, gz, sum_parts(gw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, z, *_ = inputs
    ctx.save_for_backward(x, weight, z, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, z, scale = ctx.saved_tensors
    if gy is None:
        return (None,) * 6
    gx, gz, gw = _norm_backward(gy, x, weight, z, scale, None)
    return gx, gw.to(weight.dtype), None if z is None else gz, None, None, None


_norm.register_autograd(_gradients, setup_context=_setup)


class _NormAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        y, scale = _norm(x.reshape(-1, x.shape[-1]), weight, None, eps, 1, dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return y.view(x.shape), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if gy is None:
            return beside, None, None, None
        gy, x_TD, beside = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (gy, x, beside))
        gx, _, gw = _norm_backward(gy, x_TD, weight, None, scale, beside)
        return gx.view(x.shape), gw.to(weight.dtype), None, None


def compile_cases() -> list[CompileCase]:
    """Return the calls by which the kernels are compiled without a GPU."""

    def both(features: int, dtype: torch.dtype, gated: bool, result: torch.dtype, residual: bool = False) -> None:
        x = torch.empty(16384, features, dtype=dtype, device="meta")
        weight = torch.empty(features, dtype=torch.float32, device="meta")
        z = torch.empty(16384, 2 * features, dtype=dtype, device="meta")[:, features:] if gated else None
        y, scale = forward(x, weight, z, 1e-5, 1, result)
        backward(y, x, weight, z, scale, _gate_gradient(x, z), x if residual else None)

    return [
        CompileCase("gated bf16", lambda: both(5120, torch.bfloat16, True, torch.bfloat16), representative=True),
        CompileCase("fp32", lambda: both(2560, torch.float32, False, torch.float32)),
        CompileCase("fp32 to bf16", lambda: both(2560, torch.float32, False, torch.bfloat16)),
        CompileCase("fp32 to bf16 and residual", lambda: both(2560, torch.float32, False, torch.bfloat16, True)),
    ]
