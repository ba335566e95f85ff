"""The linear layer of latent weights on a GPU: by a dense weight or, for many tokens on Hopper, by packed signs.

A dense weight holds every term of the formula and is multiplied by cuBLAS, forward and backward. On Hopper the sparse
tensor cores multiply by signs faster than that (`triton_hopper_sparse`). So one pass over the latent weights packs
their signs twice, by rows for y and by columns for the gradient of x, which is the same product with inputs and outputs
in each other's place. The gradient of the weight is a product without signs, and cuBLAS's; from it come those of the
latent weights and of the terms, in one pass more. No dense weight is formed, or kept until the backward pass.

Legend: M tokens, O out features, I in features.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.autocast import product_dtype
from bimamba_lit.kernels.binary_linear.triton import HOPPER
from bimamba_lit.kernels.binary_weight.triton import Terms, binary_weight, weight_backward
from bimamba_lit.kernels.configurations import CompileCase, architecture, configuration
from bimamba_lit.kernels.linear import linear

if HOPPER:
    from bimamba_lit.kernels.binary_linear.triton_hopper_pairs import MOST_INPUTS
    from bimamba_lit.kernels.binary_linear.triton_hopper_sparse import binary_gemm_hopper_sparse

WORTHWHILE = 1 << 36  # M O I, below which four launches more cost a host as much as the GPU gains
SMALLEST = 1024  # O I / (O + I): products grow with O I, and the pairs of x and of the gradient of y with O + I
STEP = 128  # inputs that a product takes at once


def latent_linear(
    x: Tensor,
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Compute what `naive.latent_linear` computes."""
    dtype = product_dtype(x)
    if not _by_signs(x, latent, group_scale, bias, dtype):
        terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
        return linear(x, binary_weight(latent, straight_through, *terms, dtype, reach), bias)
    if group_scale is not None:
        of_rows = group_scale.squeeze(1)
        out_scale = of_rows if out_scale is None else of_rows * out_scale
    given = x.to(dtype).reshape(-1, x.shape[-1])
    y, _, _ = _op(given, latent, in_scale, out_scale, in_shift, out_shift, bias, reach, straight_through)
    return y.view(*x.shape[:-1], latent.shape[0])


def _by_signs(
    x: Tensor, latent: Tensor, group_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None
) -> bool:
    """Return whether packed signs can multiply x, and faster than a dense weight."""
    if x.device != latent.device:
        return False
    if dtype is None:
        if x.dtype != latent.dtype or (bias is not None and bias.dtype != x.dtype):
            return False
        dtype = x.dtype
    out_features, in_features = latent.shape
    whole = out_features % 8 == 0 and in_features % STEP == 0 and x.shape[-1] == in_features
    one_group = group_scale is None or group_scale.shape[1] == 1
    if dtype.itemsize != 2 or not whole or not one_group:
        return False
    large = out_features * in_features >= SMALLEST * (out_features + in_features)
    return large and x.numel() * out_features >= WORTHWHILE and _on_hopper(x.device, max(latent.shape))


def _on_hopper(device: torch.device, features: int) -> bool:
    return HOPPER and architecture(device) == "sm_90" and features <= MOST_INPUTS


# As torch.compiler.assume_constant_result does: torch.compile need not trace how a device is asked for its name.
_on_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("bimamba_lit::latent_linear", mutates_args=())
def _op(
    x: Tensor,
    latent: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    bias: Tensor | None,
    reach: Tensor | None,
    straight_through: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, O), and the signs by rows and by columns for the backward pass."""
    return latent_forward(x, latent, (in_scale, out_scale, None, in_shift, out_shift), bias)


@_op.register_fake
def _(x: Tensor, latent: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0], latent.shape[0]), *_empty_signs(latent)


@torch.library.custom_op("bimamba_lit::latent_linear_backward", mutates_args=())
def _backward_op(
    gradient: Tensor,
    x: Tensor,
    source: Tensor,
    by_column: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    reach: Tensor | None,
    straight_through: str,
    latent: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of x and of the weight's tensors, those that are wanted; others are empty.

    `source` is the signs by rows where they are all that the gradient of the sign asks for, or the latent weights.
    """
    terms = (in_scale, out_scale, None, in_shift, out_shift)
    to_x = input_gradients(gradient, by_column, terms) if wanted[0] else gradient.new_empty(0)
    if not wanted[1]:
        return [to_x, gradient.new_empty(0, dtype=latent), *(gradient.new_empty(0) for _ in range(4))]
    to_weight = weight_backward(gradient.t() @ x, source, terms, straight_through, reach, latent)
    return [to_x, *to_weight[:3], *to_weight[4:]]


@_backward_op.register_fake
def _(gradient: Tensor, x: Tensor, source: Tensor, by_column: Tensor, *rest: Any) -> list[Tensor]:
    *terms, _, _, latent, wanted = rest
    outs = [x.new_empty(x.shape if wanted[0] else 0)]
    outs.append(x.new_empty((gradient.shape[1], x.shape[1]) if wanted[1] else 0, dtype=latent))
    return outs + [x.new_empty(0) if t is None or not wanted[1] else torch.empty_like(t) for t in terms]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, latent, *terms, bias, reach, ctx.straight_through = inputs
    _, by_row, by_column = output
    ctx.set_materialize_grads(False)  # signs have none
    ctx.latent, ctx.bias = latent.dtype, None if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(x, by_row if ctx.straight_through == "identity" else latent, by_column, *terms, reach)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:7]
    asked = [wanted[0], any(wanted[1:6])]
    found: list[Tensor | None] = [None] * 7
    if any(asked):
        found[:6] = _backward_op(gradient, *ctx.saved_tensors, ctx.straight_through, ctx.latent, asked)
    if wanted[6]:
        shape, dtype = ctx.bias
        found[6] = gradient.sum(0, dtype=torch.float32).sum_to_size(shape).to(dtype)
    return *(one if asks else None for one, asks in zip(found, wanted, strict=True)), None, None


_op.register_autograd(_backward, setup_context=_setup)


@_op.register_vmap
def _(info: Any, places: tuple[int | None, ...], *given: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """Call the op for each, as `torch.func.vmap` maps over it."""
    each = [
        _op(*(one if at is None else one.select(at, n) for one, at in zip(given, places, strict=True)))
        for n in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


def latent_forward(x: Tensor, latent: Tensor, terms: Terms, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass: y (M, O), and the signs by rows and by columns."""
    by_row, by_column = pack_both_ways(latent)
    return binary_gemm_hopper_sparse(x, by_row, x.shape[1], terms, bias), by_row, by_column


def input_gradients(gradient: Tensor, by_column: Tensor, terms: Terms) -> Tensor:
    """Launch the product with the gradient of y (M, O): that of x (M, I)."""
    in_scale, out_scale, _, in_shift, out_shift = terms
    swapped = (out_scale, in_scale, None, out_shift, in_shift)
    return binary_gemm_hopper_sparse(gradient, by_column, 8 * by_column.shape[1], swapped, None)


def _empty_signs(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the signs by rows (O, I / 8) and by columns (I, O / 8 in whole steps of a product)."""
    out_features, in_features = latent.shape
    padded = -(-out_features // STEP) * STEP // 8
    shapes = (out_features, in_features // 8), (in_features, padded)
    by_row, by_column = (torch.empty(shape, dtype=torch.uint8, device=latent.device) for shape in shapes)
    return by_row, by_column


def pack_both_ways(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signs of latent weights (O, I), packed by rows (O, I / 8) and by columns, with zeros behind."""
    by_row, by_column = _empty_signs(latent)
    chosen = configuration("latent_linear/pack", latent.dtype, latent.numel(), latent.device)
    rows, columns = chosen.blocks["ROWS"], chosen.blocks["COLUMNS"]
    _pack_kernel[(-(-latent.shape[1] // columns), -(-8 * by_column.shape[1] // rows))](
        latent, by_row.view(torch.int32), by_column.view(torch.int32), *latent.shape, by_row.shape[1] // 4,
        by_column.shape[1] // 4, *latent.stride(), **chosen.launch(),
    )  # fmt: skip
    return by_row, by_column


def compile_cases() -> list[CompileCase]:
    """Return calls that launch every kernel of this folder; see `CompileCase`."""

    def call(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        terms = (empty(in_features), empty(out_features), None, empty(in_features), empty(1))
        x, latent = empty(tokens, in_features, dtype=dtype), empty(out_features, in_features)
        y, _, by_column = latent_forward(x, latent, terms, empty(out_features))
        input_gradients(y, by_column, terms)

    def pack(out_features: int, in_features: int, dtype: torch.dtype) -> None:
        pack_both_ways(torch.empty(out_features, in_features, dtype=dtype, device="meta"))

    products = [
        CompileCase("in_proj bf16", partial(call, 16384, 10576, 2560, torch.bfloat16)),
        CompileCase("out_proj fp16", partial(call, 16384, 1536, 3072, torch.float16)),
    ]
    return [
        CompileCase("pack fp32", partial(pack, 10576, 2560, torch.float32), representative=True),
        CompileCase("pack bf16", partial(pack, 2560, 5120, torch.bfloat16)),
        *(products if HOPPER else ()),
    ]


@triton.jit
def _pack_kernel(
    latent, by_row, by_column, out_features, in_features, row_words, column_words, stride_o, stride_i,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write words of 32 signs of a tile's rows, and of its columns; bit k of a word is the k-th of its signs."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < out_features)[:, None] & (column < in_features)[None, :]
    at = row[:, None] * stride_o + column.to(tl.int64)[None, :] * stride_i
    positive = (tl.load(latent + at, mask=inside, other=0.0) > 0).to(tl.uint32)

    words = tl.sum(tl.reshape(positive << (column % 32).to(tl.uint32)[None, :], [ROWS, COLUMNS // 32, 32]), 2)
    place = tl.program_id(0) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    inside = (row < out_features)[:, None] & (place < row_words)[None, :]
    tl.store(by_row + row[:, None] * row_words + place[None, :], words.to(tl.int32), mask=inside)

    words = tl.sum(tl.reshape(positive << (row % 32).to(tl.uint32)[:, None], [ROWS // 32, 32, COLUMNS]), 1)
    place = tl.program_id(1) * (ROWS // 32) + tl.arange(0, ROWS // 32)
    inside = (place < column_words)[:, None] & (column < in_features)[None, :]
    tl.store(by_column + column.to(tl.int64)[None, :] * column_words + place[:, None], words.to(tl.int32), mask=inside)
