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
    return _op(latent, latent.shape[1], *terms, reach, straight_through, latent.dtype if dtype is None else dtype)


def dense_weight(signs: Tensor, in_features: int, terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return the weight (O, I) of packed signs (O, ceil(I / 8)); the terms receive gradients."""
    return _op(signs, in_features, *terms, None, "identity", dtype)


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
) -> Tensor:
    return weight_forward(source, in_features, (in_scale, out_scale, group_scale, in_shift, out_shift), dtype)


@_op.register_fake
def _(source: Tensor, in_features: int, *rest: Any) -> Tensor:
    return source.new_empty(source.shape[0], in_features, dtype=rest[-1])


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
) -> list[Tensor]:
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    return weight_backward(gradient, source, terms, straight_through, reach)


@_backward_op.register_fake
def _(gradient: Tensor, source: Tensor, *rest: Any) -> list[Tensor]:
    like = [None if source.dtype == torch.uint8 else source, *rest[:5]]
    return [gradient.new_empty(0) if term is None else torch.empty_like(term) for term in like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, _, *terms, reach, straight_through, _ = inputs
    ctx.save_for_backward(source, *terms, reach)
    ctx.straight_through = straight_through


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    source, *terms, reach = ctx.saved_tensors
    gradients = weight_gradients(gradient, source, terms, ctx.straight_through, reach)
    return gradients[0], None, *gradients[1:], None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def weight_gradients(
    gradient: Tensor, source: Tensor, terms: Any, straight_through: str = "identity", reach: Tensor | None = None
) -> list[Tensor | None]:
    """Return the gradients to latent weights (None for packed signs) and to each term that is given."""
    outs = _backward_op(gradient, source, *terms, reach, straight_through)
    given = [source if source.dtype != torch.uint8 else None, *terms]
    return [None if term is None else out for term, out in zip(given, outs, strict=True)]


def weight_forward(source: Tensor, in_features: int, terms: Terms, dtype: torch.dtype) -> Tensor:
    """Launch the forward pass; `source` is latent weights (O, I) or packed signs (O, ceil(I / 8)) uint8."""
    weight = torch.empty(source.shape[0], in_features, dtype=dtype, device=source.device)
    if weight.numel() == 0:
        return weight
    groups, size = _groups(terms, in_features)
    if source.dtype == torch.uint8:
        if groups > 1 and size % 8:
            return naive.compose(weight_forward(source, in_features, NO_TERMS, dtype), *terms).to(dtype)
        source = source.contiguous()
        chosen = configuration("binary_weight/unpack", dtype, weight.numel(), source.device)
        width = triton.cdiv(size, 8)
        _unpack_kernel[
            (groups * triton.cdiv(width, chosen.blocks["BYTES"]), triton.cdiv(weight.shape[0], chosen.blocks["ROWS"]))
        ](
            source, weight, *terms, weight.shape[0], in_features, size, groups, source.stride(0), *_steps(terms),
            **chosen.launch(),
        )  # fmt: skip
        return weight
    chosen = configuration("binary_weight/forward", dtype, weight.numel(), source.device)
    rows, columns = chosen.blocks["ROWS"], chosen.blocks["COLUMNS"]
    grid = (groups * triton.cdiv(size, columns), triton.cdiv(weight.shape[0], rows))
    _forward_kernel[grid](
        source, weight, *terms, weight.shape[0], in_features, size, groups,
        source.stride(0), source.stride(1), *_steps(terms), **chosen.launch(),
    )  # fmt: skip
    return weight


def weight_backward(
    gradient: Tensor, source: Tensor, terms: Terms, straight_through: str, reach: Tensor | None = None
) -> list[Tensor]:
    """Launch the backward pass: gradients to the latent weights and to each term, empty where there is none."""
    out_features, in_features = gradient.shape
    packed = source.dtype == torch.uint8
    in_scale, out_scale, group_scale, in_shift, out_shift = terms
    groups, size = _groups(terms, in_features)
    chosen = configuration("binary_weight/backward", gradient.dtype, gradient.numel(), gradient.device)
    tiles_i = triton.cdiv(size, chosen.blocks["COLUMNS"])
    tiles_o = triton.cdiv(out_features, chosen.blocks["ROWS"] * chosen.blocks["TILES"])
    latent = None if packed else torch.empty_like(source)

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(*shape, dtype=torch.float32, device=gradient.device) if wanted else None

    scaled_rows = partial(out_scale is not None or group_scale is not None, groups * tiles_i, out_features)
    plain_rows = partial(out_shift is not None, groups * tiles_i, out_features)
    scaled_columns = partial(in_scale is not None, tiles_o, in_features)
    plain_columns = partial(in_shift is not None, tiles_o, in_features)
    _backward_kernel[(groups * tiles_i, tiles_o)](
        gradient, source, latent, in_scale, out_scale, group_scale, reach,
        scaled_rows, plain_rows, scaled_columns, plain_columns, out_features, in_features, size, groups,
        gradient.stride(0), gradient.stride(1), source.stride(0), source.stride(1),
        0 if latent is None else latent.stride(0), 0 if latent is None else latent.stride(1), *_steps(terms)[:2],
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
    outs = [gradient.new_empty(0) if latent is None else latent]
    for term, value in found:
        if term is None or value is None:
            outs.append(gradient.new_empty(0))
        else:
            outs.append((value if term.shape == value.shape else value.sum().reshape(1)).to(term.dtype).contiguous())
    return outs


def _groups(terms: Terms, in_features: int) -> tuple[int, int]:
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
        weight = weight_forward(latent, in_features, terms, dtype)
        weight_backward(weight, latent, terms, straight_through, empty(out_features) if groups > 1 else None)

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
def _across(size, tiles, COLUMNS: tl.constexpr):
    """Return this program's group, its columns and which of them are the group's."""
    group = tl.program_id(0) // tiles
    within = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    return group, group * size + within, within < size


@triton.jit
def _positive(source, rows, columns, mask, stride_o, stride_i, PACKED: tl.constexpr):
    """Return whether each sign is +1, and the latent weights, or zeros for packed signs."""
    if PACKED:
        at = source + rows[:, None] * stride_o + (columns // 8).to(tl.int64)[None, :] * stride_i
        byte = tl.load(at, mask=mask, other=0).to(tl.int32)
        return ((byte >> (columns % 8)[None, :]) & 1) != 0, tl.zeros_like(byte).to(tl.float32)
    at = source + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_i
    latent = tl.load(at, mask=mask, other=0.0)
    return latent > 0, latent.to(tl.float32)


@triton.jit
def _vector(term, at, step, mask, dtype: tl.constexpr):
    return tl.load(term + at * step, mask=mask, other=0.0).to(dtype)


@triton.jit
def _forward_kernel(
    source, weight, in_scale, out_scale, group_scale, in_shift, out_shift, out_features, in_features, size, groups,
    stride_o, stride_i, in_scale_step, out_scale_step, in_shift_step, out_shift_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    group, columns, inside = _across(size, tl.cdiv(size, COLUMNS), COLUMNS)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < out_features
    mask = there[:, None] & inside[None, :]
    positive, _ = _positive(source, rows, columns, mask, stride_o, stride_i, False)
    row_scale = tl.full([ROWS], 1.0, wide)
    if out_scale is not None:
        row_scale *= _vector(out_scale, rows, out_scale_step, there, wide)
    if group_scale is not None:
        row_scale *= _vector(group_scale, rows * groups + group, 1, there, wide)
    magnitude = tl.broadcast_to(row_scale[:, None], [ROWS, COLUMNS])
    if in_scale is not None:
        magnitude = magnitude * _vector(in_scale, columns, in_scale_step, inside, wide)[None, :]
    value = tl.where(positive, magnitude, -magnitude)
    if in_shift is not None:
        value += _vector(in_shift, columns, in_shift_step, inside, wide)[None, :]
    if out_shift is not None:
        value += _vector(out_shift, rows, out_shift_step, there, wide)[:, None]
    tl.store(weight + rows[:, None] * in_features + columns[None, :], value.to(weight.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(
    signs, weight, in_scale, out_scale, group_scale, in_shift, out_shift, out_features, in_features, size, groups,
    stride_o, in_scale_step, out_scale_step, in_shift_step, out_shift_step,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Write the weight of packed signs, a byte of them at a time; groups are whole bytes."""
    wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(tl.cdiv(size, 8), BYTES)
    group = tl.program_id(0) // tiles
    byte = tl.program_id(0) % tiles * BYTES + tl.arange(0, BYTES)
    k = tl.arange(0, 8)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < out_features
    within = byte[:, None] * 8 + k[None, :]
    inside = within < size
    columns = group * size + within
    at = signs + rows[:, None] * stride_o + (group * (size // 8) + byte)[None, :]
    word = tl.load(at, mask=there[:, None] & (byte * 8 < size)[None, :], other=0).to(tl.int32)
    positive = (word[:, :, None] & (1 << k)[None, None, :]) != 0
    row_scale = tl.full([ROWS], 1.0, wide)
    if out_scale is not None:
        row_scale *= _vector(out_scale, rows, out_scale_step, there, wide)
    if group_scale is not None:
        row_scale *= _vector(group_scale, rows * groups + group, 1, there, wide)
    magnitude = tl.broadcast_to(row_scale[:, None, None], [ROWS, BYTES, 8])
    if in_scale is not None:
        magnitude = magnitude * _vector(in_scale, columns, in_scale_step, inside, wide)[None, :, :]
    value = tl.where(positive, magnitude, -magnitude)
    if in_shift is not None:
        value += _vector(in_shift, columns, in_shift_step, inside, wide)[None, :, :]
    if out_shift is not None:
        value += _vector(out_shift, rows, out_shift_step, there, wide)[:, None, None]
    to = weight + rows[:, None, None] * in_features + columns[None, :, :]
    tl.store(to, value.to(weight.dtype.element_ty), mask=there[:, None, None] & inside[None, :, :])


@triton.jit
def _backward_kernel(
    gradient, source, latent_gradient, in_scale, out_scale, group_scale, reach,
    scaled_rows, plain_rows, scaled_columns, plain_columns, out_features, in_features, size, groups,
    gradient_o, gradient_i, stride_o, stride_i, latent_o, latent_i, in_scale_step, out_scale_step, reach_step,
    PACKED: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Go down TILES tiles, one below the other; sums over rows are formed once, at the end."""
    group, columns, inside = _across(size, tl.cdiv(size, COLUMNS), COLUMNS)
    scaled_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    plain_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = rows < out_features
        mask = there[:, None] & inside[None, :]
        at = gradient + rows[:, None] * gradient_o + columns.to(tl.int64)[None, :] * gradient_i
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        positive, latent = _positive(source, rows, columns, mask, stride_o, stride_i, PACKED)
        if plain_rows is not None:
            tl.store(plain_rows + tl.program_id(0).to(tl.int64) * out_features + rows, tl.sum(value, 1), mask=there)
        if plain_columns is not None:
            plain_sum += value
        row_scale = tl.full([ROWS], 1.0, tl.float32)
        if out_scale is not None:
            row_scale *= _vector(out_scale, rows, out_scale_step, there, tl.float32)
        if group_scale is not None:
            row_scale *= _vector(group_scale, rows * groups + group, 1, there, tl.float32)
        by_column = value
        if in_scale is not None:
            by_column = value * _vector(in_scale, columns, in_scale_step, inside, tl.float32)[None, :]
        if scaled_rows is not None:
            sums = tl.sum(tl.where(positive, by_column, -by_column), 1)
            tl.store(scaled_rows + tl.program_id(0).to(tl.int64) * out_features + rows, sums, mask=there)
        if scaled_columns is not None:
            by_row = value * row_scale[:, None]
            scaled_sum += tl.where(positive, by_row, -by_row)
        if latent_gradient is not None:
            width = tl.full([ROWS], 1.0, tl.float32)
            if reach is not None:
                width = tl.load(reach + rows * reach_step, mask=there, other=1.0).to(tl.float32)
            slope = by_column * (row_scale / width)[:, None]
            distance = tl.abs(latent)
            if SLOPE == 1:
                slope = tl.where(distance <= width[:, None], slope, 0.0)
            if SLOPE == 2:
                e = tl.exp(-2 * distance / width[:, None])
                slope *= 4 * e / ((1 + e) * (1 + e))
            if SLOPE == 3:
                slope *= tl.maximum(2 - 2 * distance / width[:, None], 0.0)
            to = latent_gradient + rows[:, None] * latent_o + columns.to(tl.int64)[None, :] * latent_i
            tl.store(to, slope.to(latent_gradient.dtype.element_ty), mask=mask)
    to = tl.program_id(1).to(tl.int64) * in_features + columns
    if plain_columns is not None:
        tl.store(plain_columns + to, tl.sum(plain_sum, 0), mask=inside)
    if scaled_columns is not None:
        tl.store(scaled_columns + to, tl.sum(scaled_sum, 0), mask=inside)
