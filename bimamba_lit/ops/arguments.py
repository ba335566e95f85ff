"""What the public ops demand of their arguments: shapes in the letters of their docstrings."""

import math

import torch
from torch import Tensor

from bimamba_lit.kernels.packed_blocks.naive import BlockParameters

DIVERGENCES = ("soft_ce", "forward_kl", "reverse_kl")


def readable(tensor: Tensor) -> bool:
    """Say whether values may be read back: not while a graph is traced or captured."""
    return not torch.compiler.is_compiling() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_dimensions(name: str, tensor: Tensor, letters: str) -> None:
    """Refuse a tensor that has another number of dimensions than `letters` names."""
    if tensor.ndim != letters.count(" ") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must be ({letters.replace(' ', ', ')}).")


def check_shape(name: str, tensor: Tensor | None, letters: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape; None passes."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but must be ({letters.replace(' ', ', ')}) = {shape}."
        )


def check_float(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of integers: its results would be integers, too."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, but must be of a float dtype.")


def check_integers(name: str, tensor: Tensor | None) -> None:
    """Refuse a tensor of floats where whole numbers are told apart; None passes."""
    if tensor is not None and tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, but must be of an integer dtype.")


def check_documents(seq_idx: Tensor | None, batch: int, length: int) -> None:
    """Refuse numbers of documents that are not one integer a token."""
    check_shape("seq_idx", seq_idx, "B L", (batch, length))
    check_integers("seq_idx", seq_idx)


def check_scan(heads: int, width: int, groups: int, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    """Refuse groups, decays, skips or biases that do not fit the heads of an SSD."""
    if groups < 1 or heads % groups:
        raise ValueError(f"B has {groups} groups, which must divide x's {heads} heads.")
    check_shape("A", A, "H", (heads,))
    check_shape("dt_bias", dt_bias, "H", (heads,))
    if D is not None and tuple(D.shape) not in ((heads,), (heads, width)):
        raise ValueError(f"D has shape {tuple(D.shape)}, but must be (H,) = {(heads,)} or (H, P) = {(heads, width)}.")


def check_selective(channels: int, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> int:
    """Return the state size."""
    check_dimensions("A", A, "D N")
    size = A.shape[1]
    check_shape("A", A, "D N", (channels, size))
    check_shape("D", D, "D", (channels,))
    check_shape("delta_bias", delta_bias, "D", (channels,))
    return size


def check_maps(B: Tensor, C: Tensor, batch: int, channels: int, size: int, length: tuple[int, ...]) -> None:
    """Refuse a selective scan's B or C that do not fit its channels and states."""
    last = " L" if length else ""
    for name, maps in (("B", B), ("C", C)):
        if maps.ndim == 2 + len(length):
            check_shape(name, maps, f"B N{last}", (batch, size, *length))
            continue
        check_dimensions(name, maps, f"B G N{last}")
        groups = maps.shape[1]
        check_shape(name, maps, f"B G N{last}", (batch, groups, size, *length))
        if groups < 1 or channels % groups:
            raise ValueError(f"{name} has {groups} groups, which must divide u's {channels} channels.")


def check_activation(activation: str | None) -> None:
    """Refuse an activation that a causal convolution does not have."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}, but must be None, 'silu' or 'swish'.")


def check_signs(signs: Tensor, in_features: int) -> None:
    """Refuse packed signs of another dtype or width than their inputs need."""
    if signs.dtype != torch.uint8:
        raise TypeError(f"signs has dtype {signs.dtype}, but must be torch.uint8.")
    check_dimensions("signs", signs, "O ceil(I/8)")
    check_shape("signs", signs, "O ceil(I/8)", (signs.shape[0], math.ceil(in_features / 8)))


def check_terms(
    out_features: int,
    in_features: int,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    group_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuse terms of the packed linear layer that do not fit its weight (O, I)."""
    for name, term, letter, count in (
        ("in_scale", in_scale, "I", in_features),
        ("out_scale", out_scale, "O", out_features),
        ("in_shift", in_shift, "I", in_features),
        ("out_shift", out_shift, "O", out_features),
        ("bias", bias, "O", out_features),
    ):
        if term is not None and tuple(term.shape) not in ((count,), (1,)):
            raise ValueError(f"{name} has shape {tuple(term.shape)}, but must be ({letter},) = ({count},) or (1,).")
    if group_scale is not None:
        check_dimensions("group_scale", group_scale, "O G")
        groups = group_scale.shape[1]
        check_shape("group_scale", group_scale, "O G", (out_features, groups))
        if groups < 1 or in_features % groups:
            raise ValueError(f"group_scale has {groups} groups, which must divide in_features = {in_features}.")


def check_block(x: Tensor, conv_state: Tensor, ssm_state: Tensor, block: BlockParameters) -> None:
    """Refuse states or parameters of a packed block that do not fit one another."""
    check_dimensions("ssm_state", ssm_state, "B H P N")
    batch, heads, width, size = ssm_state.shape
    inner, channels = heads * width, heads * width + 2 * size
    check_dimensions("conv_weight", block.conv_weight, "C W")
    taps = block.conv_weight.shape[1]
    check_shape("x", x, "B D", (batch, x.shape[1]))
    check_shape("conv_weight", block.conv_weight, "C W", (channels, taps))
    check_shape("conv_state", conv_state, "B C W-1", (batch, channels, taps - 1))
    check_shape("norm_weight", block.norm_weight, "D", (x.shape[1],))
    check_shape("gated_weight", block.gated_weight, "E", (inner,))
    check_shape("conv_bias", block.conv_bias, "C", (channels,))
    for name in ("dt_bias", "A_log", "D"):
        check_shape(name, getattr(block, name), "H", (heads,))
    rows = inner + channels + heads
    for packed, out_features, in_features in (
        (block.in_proj, rows, x.shape[1]),
        (block.out_proj, x.shape[1], inner),
    ):
        if packed.bitmap is not None:
            check_shape("bitmap", packed.bitmap, "ceil(I/32/8)", (math.ceil(in_features / 256),))
            if packed.in_shift is not None and packed.in_shift.shape == (in_features,):
                packed = packed._replace(in_shift=None)
            in_features = max(8 * packed.signs.shape[1], in_features + 32)
        check_signs(packed.signs, in_features)
        check_shape("signs", packed.signs, "O ceil(I/8)", (out_features, math.ceil(in_features / 8)))
        check_terms(out_features, in_features, *packed[1:7])


def check_distillation(
    hidden_s: Tensor, head_s: Tensor, labels: Tensor | None, mask: Tensor | None, divergence: str, temperature: float,
    hard_share: float, chunk_tokens: int,
) -> tuple[tuple[int, ...], int]:  # fmt: skip
    """Return the shape of the tokens and V; refuse what no distillation loss takes, whatever its teacher is."""
    tokens = tuple(hidden_s.shape[:-1])
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, but must be one of {', '.join(DIVERGENCES)}.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be positive and finite.")
    if not 0.0 <= hard_share <= 1.0:
        raise ValueError(f"hard_share is {hard_share}, but must be between 0 and 1.")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, but must be at least 1.")
    check_float("hidden_s", hidden_s)
    if hidden_s.ndim < 2:
        raise ValueError(f"hidden_s has shape {tuple(hidden_s.shape)}, but must be (..., D).")
    check_dimensions("head_s", head_s, "V D")
    vocabulary = head_s.shape[0]
    check_shape("head_s", head_s, "V D", (vocabulary, hidden_s.shape[-1]))
    if hard_share > 0.0 and labels is None:
        raise ValueError(f"labels are needed at hard_share = {hard_share}, or set hard_share = 0.0.")
    check_shape("labels", labels, "...", tokens)
    check_integers("labels", labels)
    check_shape("mask", mask, "...", tokens)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, but must be torch.bool.")
    if (
        labels is not None
        and readable(labels)
        and bool(((labels != -100) & ((labels < 0) | (labels >= vocabulary))).any())
    ):
        raise ValueError(f"labels hold a value outside 0 to {vocabulary - 1} that is not -100.")
    return tokens, vocabulary
