"""The two RMS norms of a Mamba-2 model, computed in fp32 even where weights and inputs are in half precision."""

import torch
from torch import Tensor, nn

from bimamba_lit import ops


def at_least_fp32(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is when it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467, eq. 4).

    Args:
        d: Width of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, with_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``x`` (..., d) of any float dtype; the result is in ``dtype``, or else in that of the weight.

        A block asks for ``x`` back, too, to add what it makes of the norm: see :func:`ops.norm_and_residual`.
        """
        dtype = dtype or self.weight.dtype
        if with_residual:
            return ops.norm_and_residual(x, self.weight, self.eps, dtype)
        return ops.rms_norm(at_least_fp32(x), self.weight, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        """Return what ``print(module)`` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """Mamba-2's norm before ``out_proj``: the RMS norm of ``y * silu(z)``, a group of features at a time.

    The gate comes first (``norm_before_gate=False`` in mamba_ssm), so the norm's gain is the last thing before
    ``out_proj`` (arXiv 2405.21060, section 7.1).

    Args:
        d: Width of the last dimension.
        groups: Number of contiguous groups of features, each with a mean square of its own.
        eps: Added to the mean square.
    """

    def __init__(self, d: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate and normalise ``y`` by ``z``, both (..., d) of any float dtype; the result has the dtype of ``y``."""
        return ops.rms_norm(y, self.weight, z, self.eps, self.groups)

    def extra_repr(self) -> str:
        """Return what ``print(module)`` shows."""
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}"
