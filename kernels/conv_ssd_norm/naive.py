"""Convolution, SSD and gated norm of a Mamba-2 mixer, one after the other: the definition.

Legend: B batch, L length, H heads, P head width, I = H P inner features, G groups, N state size, K = I + 2 G N channels
of the convolution, W taps, Z = I + K + H projected features.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor

from bimamba_lit.kernels.causal_conv1d import naive as causal_conv1d
from bimamba_lit.kernels.rms_norm import naive as rms_norm
from bimamba_lit.kernels.ssd import naive as ssd

Convolution = Callable[..., Tensor | tuple[Tensor, Tensor]]
Scan = Callable[..., Tensor | tuple[Tensor, Tensor]]
Norm = Callable[..., Tensor]


class Layout(NamedTuple):
    """How wide the parts of the projected features are."""

    inner: int
    heads: int
    groups: int
    state: int

    @classmethod
    def of(cls, conv_weight: Tensor, A: Tensor, norm_weight: Tensor, groups: int) -> "Layout":
        """Return the widths that parameters tell."""
        inner = norm_weight.shape[0]
        return cls(inner, A.shape[0], groups, (conv_weight.shape[0] - inner) // (2 * groups))

    @property
    def channels(self) -> int:
        """Return the number K of channels of the convolution."""
        return self.inner + 2 * self.groups * self.state

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, Z) -> views z (B, L, I), the convolution's inputs (B, L, K), dt (B, L, H)."""
        z, xbc, dt = projected.split([self.inner, self.channels, self.heads], dim=-1)
        return z, xbc, dt

    def scanned(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, K) -> views x (B, L, H, P), B (B, L, G, N), C (B, L, G, N)."""
        maps = self.groups * self.state
        x, B, C = xbc.split([self.inner, maps, maps], dim=-1)
        B, C = (t.unflatten(-1, (self.groups, self.state)) for t in (B, C))
        return x.unflatten(-1, (self.heads, -1)), B, C


def conv_ssd_norm(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    groups: int = 1,
    eps: float = 1e-5,
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    conv: Convolution = causal_conv1d.causal_conv1d,
    scan: Scan = ssd.ssd,
    norm: Norm = rms_norm.rms_norm,
) -> Tensor:
    """Compute y (B, L, I) of the projected features (B, L, Z) with the forms of the three ops that are given."""
    layout = Layout.of(conv_weight, A, norm_weight, groups)
    z, xbc, dt = layout.parts(projected)
    xbc = cast(Tensor, conv(xbc.mT, conv_weight, conv_bias, "silu", seq_idx=seq_idx)).mT
    if mask is not None:
        # The convolution's bias would otherwise enter the state at positions that hold nothing.
        xbc = xbc * mask[..., None].to(xbc.dtype)
    x, B, C = layout.scanned(xbc)
    y = scan(x, dt, A, B, C, chunk_size, D, dt_bias=dt_bias, dt_softplus=True, seq_idx=seq_idx)
    return norm(cast(Tensor, y).flatten(-2), norm_weight, z, eps, groups)
