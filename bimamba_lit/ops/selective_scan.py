"""Mamba-1's scan. B batch, L length, D channels, G groups of maps, N state size."""

from torch import Tensor

from bimamba_lit.kernels.autocast import without_autocast
from bimamba_lit.kernels.selective_scan import chunked, naive
from bimamba_lit.ops.arguments import (
    check_dimensions,
    check_documents,
    check_float,
    check_maps,
    check_selective,
    check_shape,
)
from bimamba_lit.ops.backends import pick


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-1's scan: state = exp(delta A) state + delta u B^T and y = state C + D u, times silu(z).

    States and decays are held in float32 (float64 for float64 inputs), whatever the dtype of the inputs and whether
    autocast is on.

    Args:
        u: Inputs (B, D, L), any float dtype and strides; a transposed (B, L, D) tensor is the fastest.
        delta: Step sizes (B, D, L), before `delta_bias` and softplus.
        A: Rates (D, N), negative in a trained model.
        B: Input maps (B, N, L), or (B, G, N, L) with one map for each of G groups of channels; G divides D.
        C: Output maps (B, N, L) or (B, G, N, L).
        D: Skip weights (D,).
        z: Gates (B, D, L).
        delta_bias: Added to `delta` (D,).
        delta_softplus: Whether softplus is applied to `delta` after the bias.
        initial_states: State before the first token (B, D, N); it belongs to the first document.
        seq_idx: Document of each token (B, L), integer; the state is zeroed where it changes.
        return_last_state: Whether the state after the last token is returned too.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, D, L) in u's dtype, or (y, state (B, D, N) in float32 or float64). All inputs receive gradients.

    Raises:
        ValueError: If a shape or the backend is wrong.
        TypeError: If `u` is not of a float dtype, or `seq_idx` not of an integer one.

    Source: arXiv 2312.00752, algorithm 2; the arguments are those of mamba_ssm's ``selective_scan_fn``.
    """
    check_dimensions("u", u, "B D L")
    check_float("u", u)
    batch, channels, length = u.shape
    if length < 1:
        raise ValueError("length must be at least 1, and is 0.")
    size = check_selective(channels, A, D, delta_bias)
    check_shape("delta", delta, "B D L", (batch, channels, length))
    check_maps(B, C, batch, channels, size, (length,))
    check_shape("z", z, "B D L", (batch, channels, length))
    check_shape("initial_states", initial_states, "B D N", (batch, channels, size))
    check_documents(seq_idx, batch, length)
    run = pick(backend, u, naive.selective_scan, chunked.selective_scan)
    with without_autocast(u):
        return run(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_states, seq_idx, return_last_state
        )  # fmt: skip


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance `selective_scan` by one token; may overwrite the state given when no gradient is recorded.

    Args:
        state: State before the token (B, D, N).
        u: Inputs (B, D).
        delta: Step sizes (B, D).
        A: Rates (D, N).
        B: Input maps (B, N), or (B, G, N); G divides D.
        C: Output maps (B, N) or (B, G, N).
        D: Skip weights (D,).
        z: Gates (B, D).
        delta_bias: Added to `delta` (D,).
        delta_softplus: Whether softplus is applied to `delta` after the bias.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, D) in u's dtype and the new state (B, D, N) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape or the backend is wrong.
    """
    check_dimensions("u", u, "B D")
    batch, channels = u.shape
    size = check_selective(channels, A, D, delta_bias)
    check_shape("state", state, "B D N", (batch, channels, size))
    check_shape("delta", delta, "B D", (batch, channels))
    check_maps(B, C, batch, channels, size, ())
    check_shape("z", z, "B D", (batch, channels))
    run = pick(backend, u, naive.selective_scan_step, chunked.selective_scan_step)
    with without_autocast(u):
        return run(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
