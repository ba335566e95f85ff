"""The public ops, and the one place where a backend is chosen.

Every op has a definition, ``kernels/OP/naive.py``; most have a fast form in plain PyTorch, ``kernels/OP/chunked.py``;
some have a Triton form, ``kernels/OP/triton.py``, which is imported only when it is used. ``backend="auto"`` takes
Triton for CUDA tensors where the op has it, else the chunked form, else the naive one; where an op has no chunked form,
``"chunked"`` is ``"naive"``. Off the CPU an op's ``kernels/OP/parallel.py``, where there is one, stands for the chunked
form: large batched operations instead of tiles that fit a cache. Inputs are checked here, so kernels can trust them.

Legend: B batch, L length, H heads, P head width, G groups, N state size, D channels, W taps, O/I out/in features,
V vocabulary.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from bimamba_lit.kernels.binary_linear import chunked as chunked_linear
from bimamba_lit.kernels.binary_linear import naive as naive_linear
from bimamba_lit.kernels.binary_weight import naive as naive_weight
from bimamba_lit.kernels.causal_conv1d import chunked as chunked_conv
from bimamba_lit.kernels.causal_conv1d import naive as naive_conv
from bimamba_lit.kernels.causal_conv1d import parallel as parallel_conv
from bimamba_lit.kernels.distillation_loss import chunked as chunked_distillation
from bimamba_lit.kernels.distillation_loss import naive as naive_distillation
from bimamba_lit.kernels.packed_blocks import naive as naive_blocks
from bimamba_lit.kernels.packed_blocks.naive import BlockParameters as BlockParameters
from bimamba_lit.kernels.packed_blocks.naive import Packed as Packed
from bimamba_lit.kernels.rms_norm import chunked as chunked_norm
from bimamba_lit.kernels.rms_norm import naive as naive_norm
from bimamba_lit.kernels.selective_scan import chunked as chunked_selective
from bimamba_lit.kernels.selective_scan import naive as naive_selective
from bimamba_lit.kernels.signs import chunked as chunked_signs
from bimamba_lit.kernels.signs import naive as naive_signs
from bimamba_lit.kernels.ssd import chunked as chunked_ssd
from bimamba_lit.kernels.ssd import naive as naive_ssd
from bimamba_lit.kernels.ssd import parallel as parallel_ssd
from bimamba_lit.op_arguments import (
    DIVERGENCES as DIVERGENCES,
)
from bimamba_lit.op_arguments import (
    check_activation,
    check_block,
    check_dimensions,
    check_distillation,
    check_maps,
    check_scan,
    check_selective,
    check_shape,
    check_signs,
    check_terms,
    readable,
)

Op = TypeVar("Op", bound=Callable[..., Any])

BACKENDS = ("auto", "naive", "chunked", "triton")
STRAIGHT_THROUGH = ("identity", "clipped", "tanh", "bireal")


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

    Source: arXiv 2405.21060, section 6; the arguments are those of mamba_ssm's ``mamba_chunk_scan_combined``.
    """
    check_dimensions("x", x, "B L H P")
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
    check_shape("seq_idx", seq_idx, "B L", (batch, length))
    run = _pick(backend, x, naive_ssd.ssd, chunked_ssd.ssd, parallel_ssd.ssd)
    with _without_autocast(x):
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
    run = _pick(backend, x, naive_ssd.ssd_step, chunked_ssd.ssd_step)
    with _without_autocast(x):
        return run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


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

    Source: arXiv 2312.00752, algorithm 2; the arguments are those of mamba_ssm's ``selective_scan_fn``.
    """
    check_dimensions("u", u, "B D L")
    batch, channels, length = u.shape
    if length < 1:
        raise ValueError("length must be at least 1, and is 0.")
    size = check_selective(channels, A, D, delta_bias)
    check_shape("delta", delta, "B D L", (batch, channels, length))
    check_maps(B, C, batch, channels, size, (length,))
    check_shape("z", z, "B D L", (batch, channels, length))
    check_shape("initial_states", initial_states, "B D N", (batch, channels, size))
    check_shape("seq_idx", seq_idx, "B L", (batch, length))
    run = _pick(backend, u, naive_selective.selective_scan, chunked_selective.selective_scan)
    with _without_autocast(u):
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
    run = _pick(backend, u, naive_selective.selective_scan_step, chunked_selective.selective_scan_step)
    with _without_autocast(u):
        return run(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


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
    """
    check_dimensions("x", x, "B D L")
    batch, channels, length = x.shape
    check_dimensions("weight", weight, "D W")
    taps = weight.shape[1]
    if length < 1 or taps < 1:
        raise ValueError(f"length and taps must be at least 1, and are {length} and {taps}.")
    check_shape("weight", weight, "D W", (channels, taps))
    check_shape("bias", bias, "D", (channels,))
    check_shape("initial_states", initial_states, "B D W-1", (batch, channels, taps - 1))
    check_shape("seq_idx", seq_idx, "B L", (batch, length))
    check_activation(activation)
    run = _pick(backend, x, naive_conv.causal_conv1d, chunked_conv.causal_conv1d, parallel_conv.causal_conv1d)
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
    check_shape("weight", weight, "D W", (channels, taps))
    check_shape("conv_state", conv_state, "B D W-1", (batch, channels, taps - 1))
    check_shape("bias", bias, "D", (channels,))
    check_activation(activation)
    return _pick(backend, x, naive_conv.causal_conv1d_step)(x, conv_state, weight, bias, activation)


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

    Source: arXiv 1910.07467, eq. 4; with the gate, arXiv 2405.21060, section 7.1.
    """
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., D) with at least one feature.")
    check_shape("weight", weight, "D", (x.shape[-1],))
    check_shape("z", z, "... D", tuple(x.shape))
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups is {groups}, but must divide the {x.shape[-1]} features.")
    return _pick(backend, x, naive_norm.rms_norm, chunked_norm.rms_norm)(x, weight, z, eps, groups, dtype)


def pack_signs(w: Tensor, *, backend: str = "auto") -> Tensor:
    """Pack the signs of a matrix to bits: bit i % 8 of byte i // 8 is 1 where w > 0, and padding bits are 0.

    Zero counts as -1, as in arXiv 2411.11843. Non-finite values are the caller's matter: NaN packs as -1.

    Args:
        w: Weights (O, I), any float dtype.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        Signs (O, ceil(I / 8)), uint8.

    Raises:
        ValueError: If the shape or the backend is wrong.
    """
    check_dimensions("w", w, "O I")
    return _pick(backend, w, naive_signs.pack_signs)(w)


def unpack_signs(
    signs: Tensor, in_features: int, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> Tensor:
    """Unpack what `pack_signs` packed.

    Args:
        signs: Packed signs (O, ceil(I / 8)), uint8.
        in_features: I, which the packed width alone does not tell.
        dtype: Of the result.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        Signs (O, I) of +1 and -1 in `dtype`.

    Raises:
        ValueError: If the shape, `in_features` or the backend is wrong.
        TypeError: If `signs` is not uint8.
    """
    check_signs(signs, in_features)
    return _pick(backend, signs, naive_signs.unpack_signs, chunked_signs.unpack_signs)(signs, in_features, dtype)


def binary_linear(
    x: Tensor,
    signs: Tensor,
    in_features: int,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply by packed signs with scales and shifts, each term optional.

    ``y[o] = out_scale[o] * sum_g group_scale[o, g] * sum_{i in g} s[o, i] * in_scale[i] * x[i]
    + out_shift[o] * sum_i x[i] + sum_i in_shift[i] * x[i] + bias[o]``. Sums are in float32, or float64 for float64
    inputs; under autocast the product with the signs runs in autocast's dtype, as that of a dense layer does.

    Args:
        x: Inputs (..., I), any float dtype.
        signs: Packed signs (O, ceil(I / 8)), uint8, of `pack_signs`.
        in_features: I.
        in_scale: (I,) or (1,).
        out_scale: (O,) or (1,).
        group_scale: (O, G), for G contiguous groups of I / G inputs.
        in_shift: (I,) or (1,).
        out_shift: (O,) or (1,).
        bias: (O,) or (1,).
        activation_bits: 8 rounds ``in_scale * x`` to 255 equal steps from minus to plus its largest magnitude, token by
            token, before the product with the signs, which is then exact; the gradient passes the rounding unchanged.
            ``None`` leaves it as it is.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (..., O) in x's dtype; `x` and every term receive gradients. With 8-bit activations the error of the product
        is at most ``max abs(in_scale x) / 254`` an input: 0.7% in root mean square for normally distributed inputs.

    Raises:
        ValueError: If a shape, `in_features`, `activation_bits` or the backend is wrong.
        TypeError: If `signs` is not uint8.
    """
    check_signs(signs, in_features)
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., I) = (..., {in_features}).")
    if activation_bits not in (None, 8):
        raise ValueError(f"activation_bits is {activation_bits}, but must be None or 8.")
    check_terms(signs.shape[0], in_features, in_scale, out_scale, group_scale, in_shift, out_shift, bias)
    run = _pick(backend, x, naive_linear.binary_linear, chunked_linear.binary_linear)
    return run(x, signs, in_features, in_scale, out_scale, group_scale, in_shift, out_shift, bias, activation_bits)


def packed_blocks(
    x: Tensor,
    conv_states: list[Tensor],
    ssm_states: list[Tensor],
    blocks: list[BlockParameters],
    *,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Take one token through Mamba-2 blocks whose projections are packed; may overwrite the states given.

    The Triton form is three launches a block, for a few tokens; elsewhere it is the composition of `rms_norm`,
    `binary_linear`, `causal_conv1d_step` and `ssd_step`. One group of maps and of the gated norm.

    Args:
        x: The residual stream (B, D).
        conv_states: Of each block, the W - 1 inputs of the convolution before (B, E + 2 N, W - 1), oldest first.
        ssm_states: Of each block, the state before (B, H, P, N), with H P = E.
        blocks: Parameters of blocks in a row, with both projections as `Packed`.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        The new residual stream (B, D) in x's dtype, and the new states of each block.

    Raises:
        ValueError: If a shape or the backend is wrong.
    """
    check_dimensions("x", x, "B D")
    if not len(conv_states) == len(ssm_states) == len(blocks) > 0:
        raise ValueError(
            f"there are {len(blocks)} blocks, {len(conv_states)} conv_states and {len(ssm_states)} ssm_states, but "
            "must be as many of each, and at least one."
        )
    for conv_state, ssm_state, block in zip(conv_states, ssm_states, blocks, strict=True):
        check_block(x, conv_state, ssm_state, block)
    return _pick(backend, x, naive_blocks.packed_blocks)(x, conv_states, ssm_states, blocks)


def fuses_block(x: Tensor, conv_state: Tensor, ssm_state: Tensor, block: BlockParameters) -> bool:
    """Say whether `packed_blocks` has a kernel for a block's step, without gradients: else its own ops are faster.

    Args:
        x: As for `packed_blocks`, (B, D); of it and the states the shapes, dtypes and devices count.
        conv_state: (B, E + 2N, W - 1).
        ssm_state: (B, H, P, N).
        block: What the block is made of.
    """
    module = "bimamba_lit.kernels.packed_blocks.triton"
    if not x.is_cuda or x.dtype == torch.float64 or not _has_triton_form(module, "supports"):
        return False
    return bool(sys.modules[module].supports(x, conv_state, ssm_state, block))


def binary_weight(
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reach: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Form the dense weight of a binary layer in training: signs of latent weights with scales and shifts.

    ``weight[o, i] = out_scale[o] * group_scale[o, g(i)] * s[o, i] * in_scale[i] + out_shift[o] + in_shift[i]``, with
    s = +1 where the latent weight is positive and -1 elsewhere: what `binary_linear` multiplies by.

    Args:
        latent: Latent weights (O, I), any float dtype.
        straight_through: What stands in for the sign's derivative at a latent weight v: with u = v / reach,
            ``"identity"`` 1, ``"clipped"`` 1 where abs(u) <= 1, else 0, ``"tanh"`` 1 - tanh(u)^2, ``"bireal"``
            max(0, 2 - 2 abs(u)), each over reach: the derivative to v of u, clip(u), tanh(u) or 2 u - u abs(u).
        in_scale: (I,) or (1,).
        out_scale: (O,) or (1,).
        group_scale: (O, G), for G contiguous groups of I / G inputs.
        in_shift: (I,) or (1,).
        out_shift: (O,) or (1,).
        dtype: Of the result, rounded once; by default that of `latent`.
        reach: (O,) or (1,), positive, no gradient; by default 1.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        weight (O, I); `latent` and every term receive gradients.

    Raises:
        ValueError: If a shape, `straight_through` or the backend is wrong.
    """
    check_dimensions("latent", latent, "O I")
    if straight_through not in STRAIGHT_THROUGH:
        raise ValueError(f"straight_through is {straight_through!r}, but must be one of {', '.join(STRAIGHT_THROUGH)}.")
    check_terms(latent.shape[0], latent.shape[1], in_scale, out_scale, group_scale, in_shift, out_shift, None)
    if reach is not None and tuple(reach.shape) not in ((latent.shape[0],), (1,)):
        raise ValueError(f"reach has shape {tuple(reach.shape)}, but must be (O,) = {(latent.shape[0],)} or (1,).")
    run = _pick(backend, latent, naive_weight.binary_weight)
    return run(latent, straight_through, in_scale, out_scale, group_scale, in_shift, out_shift, dtype, reach)


def distillation_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    hidden_t: Tensor | None = None,
    head_t: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: str = "soft_ce",
    temperature: float = 1.0,
    hard_share: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int = 1024,
    backend: str = "auto",
) -> Tensor:
    """Compute (1 - hard_share) * temperature^2 * divergence(teacher, student) + hard_share * cross-entropy.

    The mean is over counted positions: those with `mask` True, if given, and a label other than -100, if given. With
    none counted the loss and its gradients are 0. Products run in autocast's dtype where autocast is on; softmax and
    sums in float32 (float64 for float64 inputs). The chunked and the Triton form never hold
    logits of more than `chunk_tokens` tokens, neither forward nor backward.

    Args:
        hidden_s: The student's final hidden states (..., D_s).
        head_s: The student's output embedding (V, D_s).
        hidden_t: The teacher's final hidden states (..., D_t); None only with ``hard_share=1.0``.
        head_t: The teacher's output embedding (V, D_t); likewise.
        labels: The token to predict at each position (...), int64, -100 where not counted; needed where
            ``hard_share > 0``.
        divergence: ``"soft_ce"`` (-sum p_t log p_s, the paper's), ``"forward_kl"`` (sum p_t log(p_t / p_s)) or
            ``"reverse_kl"`` (sum p_s log(p_s / p_t)), of the softmax of logits / temperature.
        temperature: Positive; the soft term is multiplied by its square.
        hard_share: Weight of the cross-entropy with the labels, 0 to 1.
        mask: Positions that count (...), bool.
        chunk_tokens: Tokens whose logits exist at a time in the chunked and the Triton form.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Gradients flow to `hidden_s` and `head_s` only.

    Raises:
        ValueError: If a shape, an option, a label or the backend is wrong, or an input that is needed is missing.
        TypeError: If `mask` is not bool.

    Source: arXiv 2411.11843, section 3 (soft_ce at temperature 1).
    """
    tokens, vocabulary = check_distillation(
        hidden_s, head_s, labels, mask, divergence, temperature, hard_share, chunk_tokens
    )
    if hard_share < 1.0:
        if hidden_t is None or head_t is None:
            raise ValueError(f"hidden_t and head_t are needed at hard_share = {hard_share}, or set hard_share = 1.0.")
        check_shape("hidden_t", hidden_t, "... D", (*tokens, hidden_t.shape[-1]))
        check_shape("head_t", head_t, "V D", (vocabulary, hidden_t.shape[-1]))
    run = _pick(backend, hidden_s, naive_distillation.distillation_loss, chunked_distillation.distillation_loss)
    return run(
        hidden_s, head_s, hidden_t, head_t, labels, divergence=divergence, temperature=temperature,
        hard_share=hard_share, mask=mask, chunk_tokens=chunk_tokens,
    )  # fmt: skip


def topk_distillation_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "soft_ce",
    temperature: float = 1.0,
    hard_share: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int = 1024,
    backend: str = "auto",
) -> Tensor:
    """Compute `distillation_loss` from a teacher's k likeliest tokens, all others together being one more outcome.

    With t the teacher's k + 1 probabilities, S its k tokens and s the student's softmax of logits / temperature,
    soft_ce is ``-sum_{i in S} t_i log s_i - t_rest log s_rest``, s_rest being what the student gives to all tokens
    outside of S; forward_kl and reverse_kl likewise. The gradient of the first two is that of a teacher whose rest is
    spread as the student's own. Merging outcomes never raises a divergence: the KLs are at most those over all tokens,
    and equal them at k = V. Mean, products and sums as in `distillation_loss`.

    Args:
        hidden_s: The student's final hidden states (..., D_s).
        head_s: The student's output embedding (V, D_s).
        top_ids: The teacher's likeliest tokens (..., k), integers, each once at a position.
        top_log_probs: Logarithms of their probabilities at this temperature, then that of the rest (..., k + 1); scaled
            to probabilities that sum to 1. The rest is -inf only at k = V.
        labels: As in `distillation_loss`.
        divergence: As in `distillation_loss`.
        temperature: As in `distillation_loss`; the one that `top_log_probs` were computed at.
        hard_share: As in `distillation_loss`.
        mask: As in `distillation_loss`.
        chunk_tokens: As in `distillation_loss`.
        backend: ``"auto"``, ``"naive"`` or ``"chunked"``.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Gradients flow to `hidden_s` and `head_s` only.

    Raises:
        ValueError: If a shape, an option, a label, a token or the backend is wrong.
        TypeError: If `mask` is not bool.
    """
    tokens, vocabulary = check_distillation(
        hidden_s, head_s, labels, mask, divergence, temperature, hard_share, chunk_tokens
    )
    check_shape("top_ids", top_ids, "... k", (*tokens, top_ids.shape[-1]))
    check_shape("top_log_probs", top_log_probs, "... k+1", (*tokens, top_ids.shape[-1] + 1))
    if readable(top_ids) and top_ids.numel() and not 0 <= int(top_ids.min()) <= int(top_ids.max()) < vocabulary:
        raise ValueError(f"top_ids hold a value outside 0 to {vocabulary - 1}.")
    naive, chunked = naive_distillation.topk_distillation_loss, chunked_distillation.topk_distillation_loss
    run = _pick(backend, hidden_s, naive, chunked)
    return run(
        hidden_s, head_s, top_ids, top_log_probs, labels, divergence=divergence, temperature=temperature,
        hard_share=hard_share, mask=mask, chunk_tokens=chunk_tokens,
    )  # fmt: skip


_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Choose the forms that tensors on a GPU take, for tensors without values whose memory is to be counted."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def _pick(backend: str, tensor: Tensor, naive: Op, chunked: Op | None = None, parallel: Op | None = None) -> Op:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
    if backend == "naive":
        return naive
    # In float64 the Triton forms hold sums in float32, or are another form.
    on_gpu = tensor.is_cuda or _as_on_gpu
    if backend == "triton" or (backend == "auto" and on_gpu and tensor.dtype != torch.float64):
        module = naive.__module__.removesuffix("naive") + "triton"
        if _has_triton_form(module, naive.__name__):
            if tensor.device.type == "cpu" and not _as_on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(
                    "backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 set before the start)."
                )
            kernel: Op = getattr(sys.modules[module], naive.__name__)
            return kernel
        if backend == "triton":
            raise ValueError(f"{naive.__name__} has no Triton form here; take backend='auto'.")
    if parallel is not None and (tensor.device.type != "cpu" or _as_on_gpu):
        return parallel
    return naive if chunked is None else chunked


def _has_triton_form(module: str, name: str) -> bool:
    """Import an op's Triton form and say whether there is one."""
    return _importable(module) and hasattr(import_module(module), name)


# As torch.compiler.assume_constant_result does, which imports Triton: torch.compile cannot trace an import by name.
_has_triton_form._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _importable(module: str) -> bool:
    return find_spec("triton") is not None and find_spec(module) is not None


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
