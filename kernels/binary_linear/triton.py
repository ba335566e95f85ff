"""The packed linear layer on a GPU: the integer units for a few tokens, a dense weight and cuBLAS for many.

For a token or two nothing is unpacked to numbers: `triton_counts_gemv` counts on the binary units, on Hopper
`triton_counts_pairs` where there are many inputs, and `triton_words` takes 8-bit dot products. Hopper unpacks signs in
registers instead: `triton_hopper` for tens of tokens, and for hundreds and more `triton_hopper_sparse`, or
`triton_hopper_many` with activations of 8 bits.

The dense weight holds every term of the formula, so beyond the product there is one pass that writes it: 2 bytes a
weight beside 2 M operations, a tenth of the product's time at 2,048 tokens.

Legend: M tokens, O out features, I in features, G groups of I / G contiguous inputs.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bimamba_lit.kernels.binary_linear import chunked, naive
from bimamba_lit.kernels.binary_linear.triton_counts import counts_fit
from bimamba_lit.kernels.binary_linear.triton_counts_gemv import counts_gemv
from bimamba_lit.kernels.binary_linear.triton_counts_pairs import pairs_fit, pairs_gemv
from bimamba_lit.kernels.binary_linear.triton_gemm8 import MULTIPLE, binary_gemm8
from bimamba_lit.kernels.binary_linear.triton_gemv import binary_gemv
from bimamba_lit.kernels.binary_linear.triton_words import fits, words_gemv
from bimamba_lit.kernels.binary_weight.triton import Terms, dense_weight, weight_forward, weight_gradients
from bimamba_lit.kernels.configurations import CompileCase, architecture

# The kernels for Hopper are written in an experiment of Triton's, which promises nothing: names move, and where memory
# lies; nor do its clusters. They were tried with these versions; with others the dense weight and one program serve.
TRIED = ("3.6.", "3.7.")
if HOPPER := triton.__version__.startswith(TRIED):
    from bimamba_lit.kernels.binary_linear.triton_hopper import binary_gemm_hopper
    from bimamba_lit.kernels.binary_linear.triton_hopper_many import binary_gemm_hopper_many, chosen_for
    from bimamba_lit.kernels.binary_linear.triton_hopper_pairs import MOST_INPUTS
    from bimamba_lit.kernels.binary_linear.triton_hopper_sparse import binary_gemm_hopper_sparse, fastest

FEW = 2  # tokens that counts and words take: each reads all signs anew, the integer units serve eight columns at once
MOST_COUNTED = 8192  # inputs: a thread a word, in eight warps
FEWEST_ON_HOPPER = 17  # tokens; up to 16 of 16 bits fit the integer units' columns
MANY_ON_HOPPER = 512  # tokens, of 8 bits
SPARSE_ON_HOPPER = 256  # tokens, of 16 bits
UNPACKED_AS_TOKENS = 300  # tokens that a product takes in the time in which a dense weight is written
MOST_COLUMNS = 32  # tokens times digits; beyond, the dense product is faster


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
    activation_bits: int | None = None,
) -> Tensor:
    """Compute what `naive.binary_linear` computes."""
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift, bias)
    if x.dtype == torch.float64:
        return chunked.binary_linear(x, signs, in_features, *terms, activation_bits)
    device = x.device.type
    given = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    y = _op(given.reshape(-1, in_features), signs, in_features, *terms, activation_bits)
    return y.view(*x.shape[:-1], signs.shape[0]).to(x.dtype)


@torch.library.custom_op("bimamba_lit::binary_linear", mutates_args=())
def _op(
    x: Tensor,
    signs: Tensor,
    in_features: int,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    group_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    bias: Tensor | None,
    activation_bits: int | None,
) -> Tensor:
    return linear_forward(
        x, signs, in_features, (in_scale, out_scale, group_scale, in_shift, out_shift), bias, activation_bits
    )


@_op.register_fake
def _(x: Tensor, signs: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], signs.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, signs, ctx.in_features, *terms, _ = inputs
    ctx.save_for_backward(x, signs, *terms)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, signs, *terms, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    to_x = gradient @ dense_weight(signs, ctx.in_features, tuple(terms), x.dtype) if wanted[0] else None
    to_terms: list[Tensor | None] = [None] * 5
    if any(wanted[3:8]):
        to_terms = weight_gradients(gradient.t() @ x, signs, terms)[1:]
    to_bias = None
    if wanted[8]:
        to_bias = gradient.float().sum(0)
        to_bias = (to_bias if bias.shape == to_bias.shape else to_bias.sum().reshape(1)).to(bias.dtype)
    return to_x, None, None, *to_terms, to_bias, None


_op.register_autograd(_backward, setup_context=_setup)


def linear_forward(
    x: Tensor,
    signs: Tensor,
    in_features: int,
    terms: Terms,
    bias: Tensor | None,
    activation_bits: int | None,
) -> Tensor:
    """Map x (M, I) to (M, O), by the fastest way."""
    if x.shape[0] == 0 or signs.shape[0] == 0:
        return x.new_empty(x.shape[0], signs.shape[0])
    in_scale, out_scale, group_scale, in_shift, out_shift = terms
    groups = 1 if group_scale is None else group_scale.shape[1]
    digits = 1 if activation_bits == 8 else (4 if x.dtype == torch.float32 else 2)
    counted = x.itemsize == 2 and in_features <= MOST_COUNTED and counts_fit(in_features, group_scale, x.device)
    if x.shape[0] <= FEW and counted:
        if HOPPER and pairs_fit(in_features, x.device):
            return pairs_gemv(x, signs, digits, terms, bias)
        return counts_gemv(x, signs, digits, terms, bias)
    if x.shape[0] <= FEW and fits(in_features, group_scale) and not architecture(x.device).startswith("gfx"):
        return words_gemv(x, signs, min(digits, 3), terms, bias)
    if _hopper_can(x, in_features, group_scale):
        if activation_bits == 8 and _many_on_hopper(x, signs.shape[0]):
            return binary_gemm_hopper_many(x, signs, in_features, terms, bias)
        if activation_bits is None and _sparse_on_hopper(x, signs.shape[0]):
            return binary_gemm_hopper_sparse(x, signs, in_features, terms, bias)
        if _few_on_hopper(x, signs.shape[0], in_features, activation_bits):
            return binary_gemm_hopper(x, signs, in_features, terms, bias, activation_bits)
    if x.shape[0] * digits <= MOST_COLUMNS and (groups == 1 or in_features // groups % 8 == 0):
        return binary_gemv(x, signs, in_features, digits, terms, bias)
    if activation_bits is None:
        weight = weight_forward(signs, in_features, terms, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype).expand(signs.shape[0]))
    if group_scale is None and in_features % MULTIPLE == 0:
        return binary_gemm8(x, signs, in_features, terms, bias)
    # Whole numbers up to 127 are exact in 16 bits.
    weight = weight_forward(signs, in_features, (None, None, group_scale, None, None), x.dtype)
    x_wide = x.float()
    numbers, step = naive.eight_bits(naive.scaled_inputs(x_wide, in_scale, None))
    y = F.linear(numbers.to(x.dtype), weight).float() * step
    return naive.add_terms(y, x_wide, out_scale, in_shift, out_shift, bias).to(x.dtype)


def _hopper_can(x: Tensor, in_features: int, group_scale: Tensor | None) -> bool:
    """Return whether signs that become numbers in registers can multiply x."""
    if not HOPPER or architecture(x.device) != "sm_90" or x.shape[0] < FEWEST_ON_HOPPER:
        return False
    return group_scale is None and in_features % MULTIPLE == 0 and x.itemsize == 2


def _many_on_hopper(x: Tensor, out_features: int) -> bool:
    """Return whether 8 bits are faster by a program a processor than by a program a tile."""
    tokens, in_features = x.shape
    if 2 * tokens < MANY_ON_HOPPER:
        return False
    # Half as many tokens do where they fill the processors: 256 of 8192 x 8192 take three quarters of the time.
    return tokens >= MANY_ON_HOPPER or chosen_for(tokens, out_features, in_features, x.device)[1].fill >= 0.8


def _sparse_on_hopper(x: Tensor, out_features: int) -> bool:
    """Return whether sparse tensor cores are faster than a dense weight, and than a program a tile."""
    tokens, in_features = x.shape
    if tokens < SPARSE_ON_HOPPER or in_features > MOST_INPUTS:
        return False
    # They take three quarters of the dense product's time where tiles fill all processors, and write no dense weight.
    _, plan = fastest(tokens, out_features, in_features, x.dtype, x.device)
    return plan.fill >= 0.75 * tokens / (tokens + UNPACKED_AS_TOKENS)


def _few_on_hopper(x: Tensor, out_features: int, in_features: int, activation_bits: int | None) -> bool:
    """Return whether a program a tile is faster than a dense weight."""
    tokens, weights = x.shape[0], out_features * in_features
    if weights < 1 << 22:
        return False
    # A dense weight costs bytes by its size, and registers a share of the product's time.
    return activation_bits == 8 or tokens <= weights >> (15 if weights > 1 << 24 else 16)


def compile_cases() -> list[CompileCase]:
    """Return calls that launch every kernel of this folder; see `CompileCase`."""

    def call(
        tokens: int, out_features: int, in_features: int, dtype: torch.dtype, groups: int, bits: int | None
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        signs = empty(out_features, -(-in_features // 8), dtype=torch.uint8)
        group_scale = empty(out_features, groups) if groups > 1 else None
        terms = (empty(in_features), empty(out_features), group_scale, empty(in_features), empty(1))
        linear_forward(empty(tokens, in_features, dtype=dtype), signs, in_features, terms, empty(out_features), bits)

    def signs_alone(tokens: int) -> None:
        signs = torch.empty(8192, 1024, dtype=torch.uint8, device="meta")
        x = torch.empty(tokens, 8192, dtype=torch.bfloat16, device="meta")
        linear_forward(x, signs, 8192, (None,) * 5, None, None)

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        CompileCase("one token bf16", partial(call, 1, 10576, 2560, bf16, 1, None), representative=True),
        CompileCase("one token bf16, fewer inputs", partial(call, 1, 6448, 1536, bf16, 1, None)),
        CompileCase("one token bf16, more out", partial(call, 1, 1536, 3072, bf16, 1, None)),
        CompileCase("one token fp16", partial(call, 1, 2048, 4096, torch.float16, 1, None)),
        CompileCase("one token bf16, more inputs", partial(call, 1, 2560, 5120, bf16, 1, None)),
        CompileCase("one token bf16 8-bit", partial(call, 1, 8192, 8192, bf16, 1, 8)),
        CompileCase("one token bf16, pairs", partial(call, 1, 4096, 8192, bf16, 1, None)),
        CompileCase("one token bf16, second signs", partial(call, 1, 2560, 8864, bf16, 1, None)),
        CompileCase("one token fp32 groups", partial(call, 1, 2560, 5120, fp32, 40, None), representative=True),
        CompileCase("one token odd", partial(call, 1, 1001, 2051, bf16, 1, None)),
        CompileCase("one token, signs alone", partial(signs_alone, 1)),
        CompileCase("one token odd groups", partial(call, 1, 1000, 2040, bf16, 5, None)),
        CompileCase("8 tokens bf16", partial(call, 8, 2560, 5120, bf16, 1, None)),
        CompileCase("16 tokens bf16", partial(call, 16, 2560, 5120, bf16, 1, None)),
        CompileCase("8 tokens fp32 groups", partial(call, 8, 2560, 5120, fp32, 40, None)),
        CompileCase("24 tokens bf16", partial(call, 24, 1536, 3072, bf16, 1, None)),
        CompileCase("24 tokens bf16 8-bit", partial(call, 24, 1536, 3072, bf16, 1, 8)),
        CompileCase("64 tokens bf16", partial(call, 64, 2560, 5120, bf16, 1, None), representative=True),
        CompileCase("64 tokens bf16 8-bit", partial(call, 64, 2560, 5120, bf16, 1, 8)),
        CompileCase("101 tokens fp16", partial(call, 101, 10001, 1024, torch.float16, 1, None)),
        CompileCase("101 tokens fp16 8-bit", partial(call, 101, 10001, 1024, torch.float16, 1, 8)),
        CompileCase("200 tokens bf16", partial(call, 200, 10576, 2560, bf16, 1, None)),
        CompileCase("400 tokens bf16", partial(call, 400, 10576, 2560, bf16, 1, None)),
        CompileCase("400 tokens bf16 8-bit", partial(call, 400, 10576, 2560, bf16, 1, 8)),
        CompileCase("2048 tokens bf16", partial(call, 2048, 10576, 2560, bf16, 1, None)),
        CompileCase("2048 tokens bf16, fewer inputs", partial(call, 2048, 6448, 1536, bf16, 1, None)),
        CompileCase("2048 tokens bf16, signs alone", partial(signs_alone, 2048)),
        CompileCase("300 tokens fp16", partial(call, 300, 10576, 2560, torch.float16, 1, None)),
        CompileCase("1200 tokens fp16", partial(call, 1200, 8001, 2176, torch.float16, 1, None)),
        CompileCase("2048 tokens bf16 8-bit", partial(call, 2048, 10576, 2560, bf16, 1, 8)),
        CompileCase("2048 tokens bf16 8-bit, more inputs", partial(call, 2048, 2560, 5120, bf16, 1, 8)),
        CompileCase("4096 tokens bf16 8-bit", partial(call, 4096, 8192, 8192, bf16, 1, 8)),
        CompileCase("1200 tokens fp16 8-bit", partial(call, 1200, 8001, 2176, torch.float16, 1, 8)),
        CompileCase("4096 tokens fp32 8-bit", partial(call, 4096, 8192, 8192, fp32, 1, 8)),
        CompileCase("300 tokens fp32 8-bit odd", partial(call, 300, 1001, 2048, fp32, 1, 8)),
    ]
