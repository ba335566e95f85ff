"""The dense weight of a binary layer in one pass over latent weights or packed signs, and its gradients in one more.

Every program has a tile that lies within one group of inputs, so a group's scale is one number a row. Sums over rows
and over columns leave a tile as partial sums, added up afterwards in a fixed order: no atomics.

Legend: O out features, I in features, G groups of I / G contiguous inputs.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_weight import naive
from bimamba_lit.kernels.configurations import CompileCase, configuration
from bimamba_lit.kernels.sums import sum_parts

SLOPES = {"identity": 0, "clipped": 1, "tanh": 2, "bireal": 3}
Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_TERMS: Terms = (None, None, None, None, None)
CONTIGUOUS = torch.contiguous_format


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
) -> Tensor:
    """Compute what `naive.binary_weight` computes."""
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    return _op(latent, latent.shape[1], *terms, reach, straight_through, latent.dtype if dtype is None else dtype)[0]


def dense_weight(signs: Tensor, in_features: int, terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return the weight (O, I) of packed signs (O, ceil(I / 8)); the terms receive gradients."""
    return _op(signs, in_features, *terms, None, "identity", dtype)[0]


@torch.library.custom_op("bimamba_lit::binary_weight", mutates_args=())
def _op(
    source: Tensor,
    in_features: int,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    group_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    reach: Tensor | None,
    straight_through: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the weight, and the signs of latent weights where they are all that the backward pass needs of them."""
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    kept = source.new_empty(_kept(source, terms, straight_through), dtype=torch.uint8)
    return weight_forward(source, in_features, terms, dtype, kept if kept.numel() else None), kept


def _kept(source: Tensor, terms: Any, straight_through: str) -> tuple[int, int]:
    """Return the size of the signs that are kept for the backward pass."""
    if source.dtype == torch.uint8 or straight_through != "identity" or not _whole_bytes(terms, source.shape[1]):
        return 0, 0
    return source.shape[0], -(-source.shape[1] // 8)


@_op.register_fake
def _(source: Tensor, in_features: int, *rest: Any) -> tuple[Tensor, Tensor]:
    weight = source.new_empty(source.shape[0], in_features, dtype=rest[-1])
    return weight, source.new_empty(_kept(source, rest[:5], rest[-2]), dtype=torch.uint8)


@torch.library.custom_op("bimamba_lit::binary_weight_backward", mutates_args=())
def _backward_op(
    gradient: Tensor,
    source: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    group_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    reach: Tensor | None,
    straight_through: str,
    latent: torch.dtype | None,
) -> list[Tensor]:
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    return weight_backward(gradient, source, terms, straight_through, reach, latent)


@_backward_op.register_fake
def _(gradient: Tensor, source: Tensor, *rest: Any) -> list[Tensor]:
    empty = gradient.new_empty(0)
    to_latent = empty if rest[-1] is None else torch.empty_like(gradient, dtype=rest[-1], memory_format=CONTIGUOUS)
    return [to_latent, *(empty.clone() if term is None else torch.empty_like(term) for term in rest[:5])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    source, _, *terms, reach, straight_through, _ = inputs
    ctx.set_materialize_grads(False)  # signs have none
    ctx.straight_through = straight_through
    ctx.latent = None if source.dtype == torch.uint8 else source.dtype
    ctx.save_for_backward(output[1] if _kept(source, terms, straight_through)[0] else source, *terms, reach)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    source, *terms, reach = ctx.saved_tensors
    gradients = weight_gradients(gradient, source, terms, ctx.straight_through, reach, ctx.latent)
    return gradients[0], None, *gradients[1:], None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def weight_gradients(
    gradient: Tensor,
    source: Tensor,
    terms: Any,
    straight_through: str = "identity",
    reach: Tensor | None = None,
    latent: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Return the gradients to latent weights (None where `latent`, their dtype, is) and to each term that is given."""
    outs = _backward_op(gradient, source, *terms, reach, straight_through, latent)
    return [None if given is None else out for given, out in zip([latent, *terms], outs, strict=True)]


def weight_forward(
    source: Tensor, in_features: int, terms: Terms, dtype: torch.dtype, kept: Tensor | None = None
) -> Tensor:
    """Launch the forward pass; `source` is latent weights (O, I), whose signs go to `kept`, or packed signs."""
    weight = torch.empty(source.shape[0], in_features, dtype=dtype, device=source.device)
    if weight.numel() == 0:
        return weight
    groups, size = _groups(terms, in_features)
    packed = source.dtype == torch.uint8
    if packed and not _whole_bytes(terms, in_features):
        return naive.compose(weight_forward(source, in_features, NO_TERMS, dtype), *terms).to(dtype)
    chosen = configuration(f"binary_weight/{'unpack' if packed else 'forward'}", dtype, weight.numel(), source.device)
    rows, width = chosen.blocks["ROWS"], 8 * chosen.blocks["BYTES"]
    _forward_kernel[(groups * -(-size // width), -(-weight.shape[0] // rows))](
        source, kept, weight, *terms, weight.shape[0], in_features, size, groups, *source.stride(), *_steps(terms),
        PACKED=packed, **chosen.launch(),
    )  # fmt: skip
    return weight


def weight_backward(
    gradient: Tensor,
    source: Tensor,
    terms: Terms,
    straight_through: str,
    reach: Tensor | None = None,
    latent: torch.dtype | None = None,
) -> list[Tensor]:
    """Launch the backward pass: gradients to the latent weights and to each term, empty where there is none.

    `source` is latent weights (O, I) or packed signs (O, ceil(I / 8)): for gradients to latent weights, theirs.
    """
    out_features, in_features = gradient.shape
    if source.dtype == torch.uint8 and not _whole_bytes(terms, in_features):
        source = weight_forward(source, in_features, NO_TERMS, gradient.dtype)
    packed = source.dtype == torch.uint8
    in_scale, out_scale, group_scale, in_shift, out_shift = terms
    groups, size = _groups(terms, in_features)
    chosen = configuration("binary_weight/backward", gradient.dtype, gradient.numel(), gradient.device)
    tiles_i = -(-size // (8 * chosen.blocks["BYTES"]))
    tiles_o = -(-out_features // (chosen.blocks["ROWS"] * chosen.blocks["TILES"]))

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(*shape, dtype=torch.float32, device=gradient.device) if wanted else None

    to_latent = None if latent is None else torch.empty_like(gradient, dtype=latent, memory_format=CONTIGUOUS)
    scaled_rows = partial(out_scale is not None or group_scale is not None, groups * tiles_i, out_features)
    plain_rows = partial(out_shift is not None, groups * tiles_i, out_features)
    scaled_columns = partial(in_scale is not None, tiles_o, in_features)
    plain_columns = partial(in_shift is not None, tiles_o, in_features)
    _backward_kernel[(groups * tiles_i, tiles_o)](
        gradient, source, to_latent, in_scale, out_scale, group_scale, reach,
        scaled_rows, plain_rows, scaled_columns, plain_columns, out_features, in_features, size, groups,
        *gradient.stride(), *source.stride(), *_steps(terms)[:2],
        0 if reach is None or reach.shape[0] == 1 else reach.stride(0),
        PACKED=packed, SLOPE=SLOPES[straight_through], **chosen.launch(),
    )  # fmt: skip
    by_group = None if scaled_rows is None else scaled_rows.unflatten(0, (groups, tiles_i)).sum(1)  # (G, O)
    to_out = by_group if by_group is None or group_scale is None else by_group * group_scale.t()
    to_group = by_group if by_group is None or out_scale is None else by_group * out_scale
    found: list[tuple[Tensor | None, Tensor | None]] = [
        (in_scale, None if scaled_columns is None else sum_parts(scaled_columns)),
        (out_scale, None if to_out is None else to_out.sum(0)),
        (group_scale, None if to_group is None else to_group.t()),
        (in_shift, None if plain_columns is None else sum_parts(plain_columns)),
        (out_shift, None if plain_rows is None else sum_parts(plain_rows)),
    ]
    outs = [gradient.new_empty(0) if to_latent is None else to_latent]
    for term, value in found:
        if term is None or value is None:
            outs.append(gradient.new_empty(0))
        else:
            outs.append((value if term.shape == value.shape else value.sum().reshape(1)).to(term.dtype).contiguous())
    return outs


def _whole_bytes(terms: Any, in_features: int) -> bool:
    """Return whether no byte of signs is of two groups."""
    groups, size = _groups(terms, in_features)
    return groups == 1 or size % 8 == 0


def _groups(terms: Any, in_features: int) -> tuple[int, int]:
    groups = 1 if terms[2] is None else terms[2].shape[1]
    return groups, in_features // groups


def _steps(terms: Terms) -> tuple[int, int, int, int]:
    """Return the strides of the vectors in_scale, out_scale, in_shift, out_shift: 0 where one element serves all."""
    in_scale, out_scale, _, in_shift, out_shift = terms
    vectors = (in_scale, out_scale, in_shift, out_shift)
    return tuple(0 if v is None or v.shape[0] == 1 else v.stride(0) for v in vectors)  # type: ignore[return-value]


def compile_cases() -> list[CompileCase]:
    """Return calls that launch every kernel of this folder; see `CompileCase`."""

    def call(out_features: int, in_features: int, dtype: torch.dtype, groups: int, straight_through: str) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        latent, group_scale = empty(out_features, in_features), empty(out_features, groups) if groups > 1 else None
        terms = (empty(in_features), empty(out_features), group_scale, empty(in_features), empty(1))
        kept = torch.empty(_kept(latent, terms, straight_through), dtype=torch.uint8, device="meta")
        source = kept if kept.numel() else latent
        weight = weight_forward(latent, in_features, terms, dtype, kept if kept.numel() else None)
        reach = empty(out_features) if groups > 1 else None
        weight_backward(weight, source, terms, straight_through, reach, latent.dtype)

    def from_signs() -> None:
        signs = torch.empty(2560, 640, dtype=torch.uint8, device="meta")
        weight_backward(weight_forward(signs, 5120, NO_TERMS, torch.bfloat16), signs, NO_TERMS, "identity")

    return [
        CompileCase("latent bf16", partial(call, 10576, 2560, torch.bfloat16, 1, "identity"), representative=True),
        CompileCase("latent fp32 groups clipped", partial(call, 2560, 5120, torch.float32, 40, "clipped")),
        CompileCase("latent bf16 odd tanh", partial(call, 1001, 2051, torch.bfloat16, 1, "tanh")),
        CompileCase("latent bf16 groups bireal", partial(call, 2560, 5120, torch.bfloat16, 40, "bireal")),
        CompileCase("signs bf16", from_signs),
    ]


@triton.jit
def _bytes_across(size, BYTES: tl.constexpr):
    """Return this program's group, its bytes of signs, which of them the group has, its columns, and which of those."""
    tiles = tl.cdiv(size, 8 * BYTES)
    group = tl.program_id(0) // tiles
    byte = tl.program_id(0) % tiles * BYTES + tl.arange(0, BYTES)
    within = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return group, group * (size // 8) + byte, byte * 8 < size, group * size + within, within < size


@triton.jit
def _vector(term, at, step, mask, dtype: tl.constexpr):
    return tl.load(term + at * step, mask=mask, other=0.0).to(dtype)


@triton.jit
def _row_scale(out_scale, group_scale, rows, group, groups, out_scale_step, there, dtype: tl.constexpr):
    scale = tl.full(rows.shape, 1.0, dtype)
    if out_scale is not None:
        scale *= _vector(out_scale, rows, out_scale_step, there, dtype)
    if group_scale is not None:
        scale *= _vector(group_scale, rows * groups + group, 1, there, dtype)
    return scale


@triton.jit
def _positive(signs, rows, byte, mask, stride_o, stride_i):
    """Return whether each sign is +1, (rows, bytes, 8)."""
    word = tl.load(signs + rows[:, None] * stride_o + byte[None, :] * stride_i, mask=mask, other=0)
    return (word.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]) != 0


@triton.jit
def _forward_kernel(
    source, kept, weight, in_scale, out_scale, group_scale, in_shift, out_shift,
    out_features, in_features, size, groups, stride_o, stride_i,
    in_scale_step, out_scale_step, in_shift_step, out_shift_step,
    PACKED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Write the weight of latent weights, whose signs it keeps, or of packed signs, eight columns at a time."""
    wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    group, byte, some, columns, inside = _bytes_across(size, BYTES)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < out_features
    mask = there[:, None, None] & inside[None, :, :]
    if PACKED:
        positive = _positive(source, rows, byte, there[:, None] & some[None, :], stride_o, stride_i)
    else:
        at = source + rows[:, None, None] * stride_o + columns.to(tl.int64)[None, :, :] * stride_i
        positive = tl.load(at, mask=mask, other=0.0) > 0
        if kept is not None:
            bits = tl.sum(positive.to(tl.int32) << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
            to = kept + rows[:, None] * tl.cdiv(in_features, 8) + byte[None, :]
            tl.store(to, bits, mask=there[:, None] & some[None, :])
    row_scale = _row_scale(out_scale, group_scale, rows, group, groups, out_scale_step, there, wide)
    magnitude = tl.broadcast_to(row_scale[:, None, None], [ROWS, BYTES, 8])
    if in_scale is not None:
        magnitude = magnitude * _vector(in_scale, columns, in_scale_step, inside, wide)[None, :, :]
    value = tl.where(positive, magnitude, -magnitude)
    if in_shift is not None:
        value += _vector(in_shift, columns, in_shift_step, inside, wide)[None, :, :]
    if out_shift is not None:
        value += _vector(out_shift, rows, out_shift_step, there, wide)[:, None, None]
    to = weight + rows[:, None, None] * in_features + columns[None, :, :]
    tl.store(to, value.to(weight.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gradient, source, to_latent, in_scale, out_scale, group_scale, reach,
    scaled_rows, plain_rows, scaled_columns, plain_columns, out_features, in_features, size, groups,
    gradient_o, gradient_i, stride_o, stride_i, in_scale_step, out_scale_step, reach_step,
    PACKED: tl.constexpr, SLOPE: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go down TILES tiles, one below the other; sums over rows are formed once, at the end."""
    group, byte, some, columns, inside = _bytes_across(size, BYTES)
    scaled_sum = tl.zeros([ROWS, BYTES, 8], tl.float32)
    plain_sum = tl.zeros([ROWS, BYTES, 8], tl.float32)
    column_scale = tl.full([BYTES, 8], 1.0, tl.float32)
    if in_scale is not None:
        column_scale = _vector(in_scale, columns, in_scale_step, inside, tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        rows = (tl.program_id(1) * TILES + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = rows < out_features
        mask = there[:, None, None] & inside[None, :, :]
        at = gradient + rows[:, None, None] * gradient_o + columns.to(tl.int64)[None, :, :] * gradient_i
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if PACKED:
            positive = _positive(source, rows, byte, there[:, None] & some[None, :], stride_o, stride_i)
        else:
            at = source + rows[:, None, None] * stride_o + columns.to(tl.int64)[None, :, :] * stride_i
            latent = tl.load(at, mask=mask, other=0.0)
            positive = latent > 0
        row_scale = _row_scale(out_scale, group_scale, rows, group, groups, out_scale_step, there, tl.float32)
        at_row = tl.program_id(0).to(tl.int64) * out_features + rows
        if plain_rows is not None:
            tl.store(plain_rows + at_row, tl.sum(tl.sum(value, 2), 1), mask=there)
        if plain_columns is not None:
            plain_sum += value
        signed = tl.where(positive, value, -value)
        if scaled_rows is not None:
            tl.store(scaled_rows + at_row, tl.sum(tl.sum(signed * column_scale[None, :, :], 2), 1), mask=there)
        if scaled_columns is not None:
            scaled_sum += signed * row_scale[:, None, None]
        if to_latent is not None:
            width = tl.full([ROWS], 1.0, tl.float32)
            if reach is not None:
                width = tl.load(reach + rows * reach_step, mask=there, other=1.0).to(tl.float32)
            slope = value * column_scale[None, :, :] * (row_scale / width)[:, None, None]
            if SLOPE > 0:
                distance = tl.abs(latent.to(tl.float32)) / width[:, None, None]
                if SLOPE == 1:
                    slope = tl.where(distance <= 1, slope, 0.0)
                if SLOPE == 2:
                    e = tl.exp(-2 * distance)
                    slope *= 4 * e / ((1 + e) * (1 + e))
                if SLOPE == 3:
                    slope *= tl.maximum(2 - 2 * distance, 0.0)
            to = to_latent + rows[:, None, None] * in_features + columns[None, :, :]
            tl.store(to, slope.to(to_latent.dtype.element_ty), mask=mask)
    to = tl.program_id(1).to(tl.int64) * in_features + columns
    if plain_columns is not None:
        tl.store(plain_columns + to, tl.sum(plain_sum, 0), mask=inside)
    if scaled_columns is not None:
        tl.store(scaled_columns + to, tl.sum(scaled_sum, 0), mask=inside)
