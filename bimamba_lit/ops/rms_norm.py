"""The norm of a block, gated or not. D features."""

import torch
from torch import Tensor

from bimamba_lit.kernels.rms_norm import chunked, naive
from bimamba_lit.ops.arguments import check_float, check_shape
from bimamba_lit.ops.backends import pick


def rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Divide by the root of the mean square over the last dimension, after a gate if there is one, and scale.

    ``v = x * silu(z)``, then ``v / sqrt(mean(v^2) + eps) * weight``: the gate comes first, which mamba_ssm calls
    ``norm_before_gate=False``. Sums are in float32 (float64 for float64 inputs).

    Args:
        x: Inputs (..., D), any float dtype.
        weight: Gains (D,).
        z: Gates (..., D).
        eps: Added to the mean square.
        groups: Number of contiguous groups of features, each with a mean square of its own; divides D.
        dtype: Of the result; None is x's.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (..., D) in `dtype`; `x`, `weight` and `z` receive gradients.

    Raises:
        ValueError: If a shape, `groups` or the backend is wrong.
        TypeError: If `x` is not of a float dtype.

    Source: arXiv 1910.07467, eq. 4; with the gate, arXiv 2405.21060, section 7.1.
    """
    _check(x, weight)
    check_shape("z", z, "... D", tuple(x.shape))
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups is {groups}, but must divide the {x.shape[-1]} features.")
    return pick(backend, x, naive.rms_norm, chunked.rms_norm)(x, weight, z, eps, groups, dtype)


def norm_and_residual(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the norm of a residual stream beside the stream itself, to which a block adds what it makes of the norm.

    The values are those of :func:`rms_norm` and ``x``. On a GPU the norm's backward pass adds the gradient that the
    stream gets to its own, in float32, which autograd would do in one more pass over both.

    Args:
        x: The stream (..., D), any float dtype.
        weight: Gains (D,).
        eps: Added to the mean square.
        dtype: Of the norm; None is x's.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        The norm (..., D) in `dtype`, and `x`, not to be changed in place; `x` and `weight` receive gradients.

    Raises:
        ValueError: If a shape or the backend is wrong.
        TypeError: If `x` is not of a float dtype.
    """
    _check(x, weight)
    return pick(backend, x, naive.norm_and_residual, chunked.norm_and_residual)(x, weight, eps, dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    check_float("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., D) with at least one feature.")
    check_shape("weight", weight, "D", (x.shape[-1],))
