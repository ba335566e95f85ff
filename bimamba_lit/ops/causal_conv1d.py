"""A convolution of each channel over its past. B batch, L length, D channels, W taps."""

from torch import Tensor

from bimamba_lit.kernels.causal_conv1d import chunked, naive, parallel
from bimamba_lit.ops.arguments import check_activation, check_dimensions, check_documents, check_float, check_shape
from bimamba_lit.ops.backends import pick


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps over the past: y[t] = act(bias + sum_w weight[w] x[t - (W - 1) + w]).

    Args:
        x: Inputs (B, D, L), any float dtype and strides; a transposed (B, L, D) tensor is not copied.
        weight: Taps (D, W), the last one for the current input.
        bias: Per channel (D,).
        activation: ``None``, or ``"silu"`` (``"swish"`` is the same).
        initial_states: The W - 1 inputs before the first (B, D, W - 1); they belong to the first document.
        seq_idx: Document of each token (B, L), integer; inputs of another document count as zero.
        return_final_states: Whether the last W - 1 inputs of the last document are returned too.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, D, L) in x's dtype, or (y, states (B, D, W - 1)). All float inputs receive gradients.

    Raises:
        ValueError: If a shape, the activation or the backend is wrong.
        TypeError: If `x` is not of a float dtype, or `seq_idx` not of an integer one.
    """
    check_dimensions("x", x, "B D L")
    check_float("x", x)
    batch, channels, length = x.shape
    check_dimensions("weight", weight, "D W")
    taps = weight.shape[1]
    if length < 1 or taps < 1:
        raise ValueError(f"length and taps must be at least 1, and are {length} and {taps}.")
    check_shape("weight", weight, "D W", (channels, taps))
    check_shape("bias", bias, "D", (channels,))
    check_shape("initial_states", initial_states, "B D W-1", (batch, channels, taps - 1))
    check_documents(seq_idx, batch, length)
    check_activation(activation)
    run = pick(backend, x, naive.causal_conv1d, chunked.causal_conv1d, parallel.causal_conv1d)
    return run(x, weight, bias, activation, initial_states, seq_idx, return_final_states)


def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance `causal_conv1d` by one token; may overwrite the state given when no gradient is recorded.

    Args:
        x: Inputs (B, D).
        conv_state: The W - 1 inputs before (B, D, W - 1), oldest first.
        weight: Taps (D, W).
        bias: Per channel (D,).
        activation: ``None``, or ``"silu"`` (``"swish"`` is the same).
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (B, D) in x's dtype and the new state (B, D, W - 1).

    Raises:
        ValueError: If a shape, the activation or the backend is wrong.
    """
    check_dimensions("x", x, "B D")
    batch, channels = x.shape
    check_dimensions("weight", weight, "D W")
    taps = weight.shape[1]
    if taps < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but must have at least one tap.")
    check_shape("weight", weight, "D W", (channels, taps))
    check_shape("conv_state", conv_state, "B D W-1", (batch, channels, taps - 1))
    check_shape("bias", bias, "D", (channels,))
    check_activation(activation)
    return pick(backend, x, naive.causal_conv1d_step)(x, conv_state, weight, bias, activation)
