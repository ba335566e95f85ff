"""Mamba-2's scan. B batch, L length, H heads, P head width, G groups of maps, N state size."""

import math

from torch import Tensor

from bimamba_lit.kernels.autocast import without_autocast
from bimamba_lit.kernels.ssd import chunked, naive, parallel
from bimamba_lit.ops.arguments import check_dimensions, check_documents, check_float, check_scan, check_shape
from bimamba_lit.ops.backends import pick


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's scan (SSD): state = exp(dt A) state + dt x B^T and y = state C + D x, times silu(z).

    States and decays are held in float32 (float64 for float64 inputs), whatever the dtype of the inputs and whether
    autocast is on.

    Args:
        x: Inputs (B, L, H, P), any float dtype.
        dt: Step sizes (B, L, H), before `dt_bias`, softplus and `dt_limit`.
        A: Rate of each head (H,), negative in a trained model.
        B: Input maps (B, L, G, N); G divides H.
        C: Output maps (B, L, G, N).
        chunk_size: An upper bound on the chunk of the chunked forms, which may take a smaller one where that is
            faster; the result is the same to rounding.
        D: Skip weights (H,) or (H, P).
        z: Gates (B, L, H, P).
        dt_bias: Added to `dt` (H,).
        dt_softplus: Whether softplus is applied to `dt` after the bias.
        dt_limit: Bounds to which the step sizes are clamped last.
        initial_states: State before the first token (B, H, P, N); it belongs to the first document.
        seq_idx: Document of each token (B, L), integer; the state is zeroed where it changes.
        return_final_states: Whether the state after the last token is returned too.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, L, H, P) in x's dtype, or (y, states (B, H, P, N) in float32 or float64). All inputs receive gradients.

    Raises:
        ValueError: If a shape or the backend is wrong.
        TypeError: If `x` is not of a float dtype, or `seq_idx` not of an integer one.

    Source: arXiv 2405.21060, section 6; the arguments are those of mamba_ssm's ``mamba_chunk_scan_combined``.
    """
    check_dimensions("x", x, "B L H P")
    check_float("x", x)
    batch, length, heads, width = x.shape
    check_dimensions("B", B, "B L G N")
    groups, size = B.shape[2:]
    if length < 1 or chunk_size < 1:
        raise ValueError(f"length and chunk_size must be at least 1, and are {length} and {chunk_size}.")
    check_scan(heads, width, groups, A, D, dt_bias)
    check_shape("dt", dt, "B L H", (batch, length, heads))
    check_shape("B", B, "B L G N", (batch, length, groups, size))
    check_shape("C", C, "B L G N", (batch, length, groups, size))
    check_shape("z", z, "B L H P", (batch, length, heads, width))
    check_shape("initial_states", initial_states, "B H P N", (batch, heads, width, size))
    check_documents(seq_idx, batch, length)
    run = pick(backend, x, naive.ssd, chunked.ssd, parallel.ssd)
    with without_autocast(x):
        return run(
            x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx,
            return_final_states,
        )  # fmt: skip


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance `ssd` by one token; may overwrite the state given when no gradient is recorded.

    Args:
        state: State before the token (B, H, P, N).
        x: Inputs (B, H, P).
        dt: Step sizes (B, H).
        A: Rate of each head (H,).
        B: Input maps (B, G, N); G divides H.
        C: Output maps (B, G, N).
        D: Skip weights (H,) or (H, P).
        z: Gates (B, H, P).
        dt_bias: Added to `dt` (H,).
        dt_softplus: Whether softplus is applied to `dt` after the bias.
        dt_limit: Bounds to which the step sizes are clamped last.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, H, P) in x's dtype and the new state (B, H, P, N) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape or the backend is wrong.
    """
    check_dimensions("x", x, "B H P")
    batch, heads, width = x.shape
    check_dimensions("B", B, "B G N")
    groups, size = B.shape[1:]
    check_scan(heads, width, groups, A, D, dt_bias)
    check_shape("state", state, "B H P N", (batch, heads, width, size))
    check_shape("dt", dt, "B H", (batch, heads))
    check_shape("B", B, "B G N", (batch, groups, size))
    check_shape("C", C, "B G N", (batch, groups, size))
    check_shape("z", z, "B H P", (batch, heads, width))
    run = pick(backend, x, naive.ssd_step, chunked.ssd_step)
    with without_autocast(x):
        return run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
