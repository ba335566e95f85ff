"""RMS norm (arXiv 1910.07467, eq. 4) of an input times its gate: the definition that every other form is held to.

Legend: T tokens, D features, G groups.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import accumulator


def rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``v / sqrt(mean(v^2) + eps) * weight`` with ``v = x * silu(z)``, x and z (..., D), a mean a group."""
    wide = accumulator(x)
    v = x.to(wide) if z is None else x.to(wide) * F.silu(z.to(wide))
    v = v.unflatten(-1, (groups, -1))
    normal = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (normal.flatten(-2) * weight.to(wide)).to(dtype or x.dtype)


def norm_and_residual(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    norm: Callable[..., Tensor] = rms_norm,
) -> tuple[Tensor, Tensor]:
    """Return the norm of a residual stream, in the form given, and the stream itself."""
    return norm(x, weight, None, eps, 1, dtype), x
