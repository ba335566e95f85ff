"""Pointwise functions of Triton kernels, in float32 or float64."""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x))."""
    small = tl.exp2(-tl.abs(x) * LOG2_E)
    # log(1 + e) loses e below half an ulp of 1; there the series is exact.
    return tl.maximum(x, 0.0) + tl.where(small < 1e-4, small - 0.5 * small * small, tl.log2(1.0 + small) * LN_2)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def silu_slope(x):
    """Return the derivative of x * sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))
