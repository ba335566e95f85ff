"""What a Mamba-2 mixer does between its projections.

B batch, L length, H heads, P head width, I = H P inner features, G groups, N state size, K = I + 2 G N channels, W
taps, Z = I + K + H projected features.
"""

from torch import Tensor

from bimamba_lit.kernels.autocast import without_autocast
from bimamba_lit.kernels.conv_ssd_norm import chunked, naive, parallel
from bimamba_lit.ops.arguments import check_dimensions, check_documents, check_float, check_shape
from bimamba_lit.ops.backends import pick


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
    backend: str = "auto",
) -> Tensor:
    """Split the projected features into z, (x, B, C) and dt; `causal_conv1d`, `ssd`, then `rms_norm` gated by z.

    The convolution has SiLU, and dt softplus. On a GPU it is one op, whose gradients need no putting together.

    Args:
        projected: z (I), x (I), B (G N), C (G N) and dt (H) side by side (B, L, I + K + H), any float dtype.
        conv_weight: Taps (K, W).
        conv_bias: (K,).
        A: Rate of each head (H,), negative in a trained model.
        D: Skip weights (H,).
        dt_bias: Added to dt (H,).
        norm_weight: Gains of the norm (I,).
        groups: Number G of groups of B and C, and of the norm; divides H.
        eps: Added to the norm's mean square.
        chunk_size: As for `ssd`.
        seq_idx: Document of each token (B, L), integer; convolution and scan start afresh where it changes.
        mask: (B, L), 1 where a position counts and 0 where nothing is written to the state.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, L, I) in the dtype of `projected`. All float inputs but the mask receive gradients.

    Raises:
        ValueError: If a shape, `groups` or the backend is wrong.
        TypeError: If `projected` is not of a float dtype, or `seq_idx` not of an integer one.

    Source: arXiv 2405.21060, section 7.1.
    """
    check_dimensions("projected", projected, "B L Z")
    check_float("projected", projected)
    batch, length, _ = projected.shape
    check_dimensions("conv_weight", conv_weight, "K W")
    channels, taps = conv_weight.shape
    check_dimensions("norm_weight", norm_weight, "I")
    check_dimensions("A", A, "H")
    inner, heads = norm_weight.shape[0], A.shape[0]
    if groups < 1 or heads < 1 or heads % groups or inner % heads:
        raise ValueError(f"groups is {groups}, which must divide {heads} heads, and these {inner} inner features.")
    if channels <= inner or (channels - inner) % (2 * groups):
        raise ValueError(f"conv_weight has {channels} channels, but must have {inner} and twice as many as B has.")
    if length < 1 or chunk_size < 1 or taps < 1:
        raise ValueError(f"length, chunk_size and taps must be at least 1, and are {length}, {chunk_size} and {taps}.")
    check_shape("projected", projected, "B L I+K+H", (batch, length, inner + channels + heads))
    check_shape("conv_bias", conv_bias, "K", (channels,))
    check_shape("D", D, "H", (heads,))
    check_shape("dt_bias", dt_bias, "H", (heads,))
    check_documents(seq_idx, batch, length)
    check_shape("mask", mask, "B L", (batch, length))
    run = pick(backend, projected, naive.conv_ssd_norm, chunked.conv_ssd_norm, parallel.conv_ssd_norm)
    with without_autocast(projected):
        return run(
            projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, groups, eps, chunk_size, seq_idx, mask
        )
