"""The packed product for a token or a few, on 8-bit dot products of words: what a decoding step is made of.

A word is 32 signs of a row. Its bits k of four bytes, shifted down and masked, are four numbers 0 or 1: one operand of
a dot product of 8-bit integers as they stand. The other holds digits of the inputs 8 j + k, in fixed point with a step
for each 32 inputs: three digits for 32-bit floats, two for 16-bit ones (a step of 2^-15 of the largest), one where
8-bit activations are asked for, whose step is a token's. A word's sum is exact; sums of words are taken in an order
that is fixed by the shape, so runs repeat bit for bit.

At these sizes all signs fit in the registers of the device. A program asks for its own before it waits for the kernel
before it (programmatic dependent launch), so that memory is read while that one still works. Kernels let the next one
begin at once, or after their own wait, as the first of a call does. So before its wait a kernel of a call may read what
was there before the call, and after it what the kernels before it wrote.

Legend: M tokens, O out features, I in features, W = I / 32 words of a row, G groups. `digits` are (M, 8 DIGITS, W):
digit d of bit k in row 8 d + k. `scales` are (M, 5, W): a word's step, and its sums of squares, of inputs, of inputs
times `in_shift`, and of the numbers that its digits make, an integer's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms
from bimamba_lit.kernels.configurations import Configuration, architecture, configuration

BITS = 32  # of a word
MOST_WORDS = 256  # of a row; more would not stay in registers


def fits(in_features: int, group_scale: Tensor | None) -> bool:
    """Say whether rows are whole words, and a group's inputs too."""
    groups = 1 if group_scale is None else group_scale.shape[1]
    return in_features % (BITS * groups) == 0 and in_features <= BITS * MOST_WORDS


def words_gemv(x: Tensor, signs: Tensor, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype, with `digits` 1, 2 or 3."""
    tokens, in_features = x.shape
    out_features, words = signs.shape[0], in_features // BITS
    in_scale, _, _, in_shift, _ = terms
    made = _make_digits(x, digits, in_scale, in_shift)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/words", x.dtype, words, x.device)
    words_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        *row_arguments(signs, made, terms, bias), y, out_features, in_features,
        **row_constants(words, digits, signs.device, chosen),
    )  # fmt: skip
    return y


def _make_digits(x: Tensor, digits: int, in_scale: Tensor | None, in_shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the digits and the scales of x (M, I) times `in_scale`."""
    tokens, words = x.shape[0], x.shape[1] // BITS
    made = empty_digits(tokens, words, digits, x.device)
    chosen = configuration("binary_linear/word_digits", x.dtype, digits, x.device)
    block = triton.next_power_of_2(words) if digits == 1 else chosen.blocks["WORDS"]
    digits_kernel[(triton.cdiv(words, block), tokens)](
        x, in_scale, in_shift, *made, *x.stride(), stride_of(in_scale), stride_of(in_shift), W=words, DIGITS=digits,
        PDL=overlaps(x.device), **(chosen.launch() | {"WORDS": block}), **launch_early(x.device),
    )  # fmt: skip
    return made


def empty_digits(tokens: int, words: int, digits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return room for digits and scales."""
    return (
        torch.empty(tokens, 8 * digits, words, dtype=torch.int32, device=device),
        torch.empty(tokens, 5, words, dtype=torch.float32, device=device),
    )


def row_arguments(signs: Tensor, made: tuple[Tensor, Tensor], terms: Terms, bias: Tensor | None) -> tuple:
    """Return the first arguments of every kernel with `multiply` in it."""
    _, out_scale, group_scale, in_shift, out_shift = terms
    groups = 1 if group_scale is None else group_scale.shape[1]
    return (
        aligned_words(signs), *made, out_scale, group_scale, in_shift, out_shift, bias,
        stride_of(out_scale), stride_of(out_shift), stride_of(bias), groups,
    )  # fmt: skip


def aligned_words(signs: Tensor) -> Tensor:
    """Return signs (O, I / 8) as words (O, W), the first where a load of four may begin."""
    aligned = signs.contiguous() if signs.storage_offset() % 16 == 0 else signs.clone()
    return aligned.view(torch.int32)


def row_constants(words: int, digits: int, device: torch.device, chosen: Configuration) -> dict[str, int]:
    """Return the constants that every kernel with `multiply` in it takes."""
    return {
        "W": words, "ALL": triton.next_power_of_2(words), "DIGITS": digits,
        "PTX": writes_ptx(device), "PDL": overlaps(device),
        **chosen.launch(), **launch_early(device),
    }  # fmt: skip


def stride_of(term: Tensor | None) -> int:
    """Return the stride of a term, which is 0 where one element serves all."""
    return 0 if term is None or term.shape[0] == 1 else term.stride(0)


def writes_ptx(device: torch.device) -> bool:
    """Say whether instructions that Triton has no operation for can be written."""
    return architecture(device).startswith("sm_")


def overlaps(device: torch.device) -> bool:
    """Say whether a kernel may begin before the one before it has ended."""
    name = architecture(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


def launch_early(device: torch.device) -> dict[str, bool]:
    """Return the launch option by which it does."""
    return {"launch_pdl": True} if overlaps(device) else {}


@triton.jit
def begin_next(PDL: tl.constexpr):
    """Let the kernel after begin."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel before has ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_if(zero):
    """Wait until the kernel before has ended; a branch, which the compiler moves nothing across."""
    tl.inline_asm_elementwise(
        "{.reg .pred never; setp.ne.u32 never, $1, 0; @never bra LAB_PAST; griddepcontrol.wait; "
        "LAB_PAST: mov.u32 $0, 0;}",
        "=r,r", [zero], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _merge(size, largest, square, total, shift, other_size, other_largest, other_square, other_total, other_shift):
    largest = tl.maximum(largest, other_largest)
    return size + other_size, largest, square + other_square, total + other_total, shift + other_shift


@triton.jit
def write_digits(
    x, u, scaled, shift, w, there, digits, scales, W: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr
):
    """Write digits and scales of words w, of their inputs x (WORDS, 32), with a norm's gain u, and `scaled`.

    `shift` is u times `in_shift`.
    """
    limit: tl.constexpr = 127 if DIGITS == 1 else (127 * 256 if DIGITS == 2 else 127 * 65536)
    size = tl.abs(scaled)
    size, largest, square, total, shift = tl.reduce((size, size, x * x, u, shift), 1, _merge)
    if DIGITS == 1:
        size = tl.zeros_like(size) + tl.sum(size, 0)
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    finite = size < float("inf")
    inverse = tl.where(finite & (largest > 1e-30), limit / tl.maximum(largest, 1e-30), 0.0)
    number = tl.floor(tl.where(finite[:, None], scaled, 0.0) * inverse[:, None] + 0.5).to(tl.int32)
    row = tl.arange(0, 8)[None, :]
    place = row * W + w[:, None]
    values = tl.where(row == 0, tl.where(finite, largest / limit, float("nan"))[:, None], square[:, None])
    values = tl.where(row == 2, total[:, None], values)
    values = tl.where(row == 3, shift[:, None], values)
    values = tl.where(row == 4, tl.sum(number, 1).to(tl.float32, bitcast=True)[:, None], values)
    tl.store(scales + place, values, mask=there[:, None] & (row < 5))
    byte = tl.arange(0, 4)[None, :, None] * 8
    for digit in tl.static_range(DIGITS):
        low = ((number + 128) & 255) - 128
        bytes = tl.reshape(low & 255, [WORDS, 4, 8]) << byte
        tl.store(digits + digit * 8 * W + place, tl.sum(bytes, 1), mask=there[:, None])
        number = (number - low) >> 8


@triton.jit
def digits_kernel(
    x, in_scale, in_shift, digits, scales, x_m, x_i, in_scale_step, in_shift_step,
    W: tl.constexpr, DIGITS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the digits and scales of WORDS words of a token."""
    wait(PDL)
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    there = w < W
    i = w[:, None] * 32 + tl.arange(0, 32)[None, :]
    real = there[:, None]
    value = tl.load(x + token * x_m + i * x_i, mask=real, other=0.0).to(tl.float32)
    scaled = value
    if in_scale is not None:
        scaled = value * tl.load(in_scale + i * in_scale_step, mask=real, other=0.0).to(tl.float32)
    shift = value
    if in_shift is not None:
        shift = value * tl.load(in_shift + i * in_shift_step, mask=real, other=0.0).to(tl.float32)
    digits += token * (8 * DIGITS * W)
    scales += token * (5 * W)
    write_digits(value, value, scaled, shift, w, there, digits, scales, W, WORDS, DIGITS)


@triton.jit
def load_words(signs, rows, there, W: tl.constexpr, CHUNK: tl.constexpr):
    """Ask for all words of rows, CHUNK columns of them at a time."""
    at = signs + rows.to(tl.int64)[:, None] * W + tl.arange(0, CHUNK)[None, :]
    words = ()
    for start in tl.static_range(0, W, CHUNK):
        inside = there[:, None] & (start + tl.arange(0, CHUNK) < W)[None, :]
        words = words + (tl.load(at + start, mask=inside, other=0),)  # type: ignore[assignment]
    return words


@triton.jit
def _dot4(bits, digits, total, PTX: tl.constexpr):
    """Add the dot product of four unsigned and four signed 8-bit integers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [bits, digits, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            total += ((bits >> (8 * byte)) & 255) * ((digits << (24 - 8 * byte)) >> 24)
        return total


@triton.jit
def load_terms(rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, ROWS: tl.constexpr):
    """Return the terms of rows, float32, those that there are not as what changes nothing."""
    scale, shift, added = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if out_scale is not None:
        scale = tl.load(out_scale + rows * out_scale_step, mask=there, other=0.0).to(tl.float32)
    if out_shift is not None:
        shift = tl.load(out_shift + rows * out_shift_step, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + rows * bias_step, mask=there, other=0.0).to(tl.float32)
    return scale, shift, added


@triton.jit
def _add(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def multiply(
    words, terms, rows, there, digits, scales, group_scale, in_shift, out_shift, groups, in_features, eps,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr,
    NORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Return rows of the layer, float32, of a token's digits; NORM divides by its root mean square."""
    every = tl.arange(0, ALL)
    square = tl.load(scales + W + every, mask=every < W, other=0.0)
    total = tl.load(scales + 2 * W + every, mask=every < W, other=0.0)
    shifted = tl.load(scales + 3 * W + every, mask=every < W, other=0.0)
    columns = tl.arange(0, CHUNK)
    product = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(len(words)):
        w = chunk * CHUNK + columns
        numbers = tl.load(scales + 4 * W + w, mask=w < W, other=0.0).to(tl.int32, bitcast=True)
        number = tl.zeros([ROWS, CHUNK], tl.int32) - numbers[None, :]
        step = tl.load(scales + w, mask=w < W, other=0.0)
        for digit in tl.static_range(DIGITS):
            positive = tl.zeros([ROWS, CHUNK], tl.int32)
            for bit in tl.static_range(8):
                value = tl.load(digits + (8 * digit + bit) * W + w, mask=w < W, other=0)[None, :]
                positive = _dot4((words[chunk] >> bit) & 0x01010101, value, positive, PTX)
            number += positive << (8 * digit + 1)
        part = number.to(tl.float32) * step[None, :]
        if group_scale is not None:
            at = group_scale + rows[:, None] * groups + (w * groups // W)[None, :]
            part *= tl.load(at, mask=there[:, None] & (w < W)[None, :], other=0.0).to(tl.float32)
        product += part
    scale, shift, added = terms
    square_sum, total_sum, shifted_sum = tl.reduce((square, total, shifted), 0, _add)
    y = tl.sum(product, 1) * scale
    if out_shift is not None:
        y += shift * total_sum
    if in_shift is not None:
        y += shifted_sum
    if NORM:
        y *= 1.0 / tl.sqrt(square_sum / in_features + eps)
    return y + added


@triton.jit
def words_kernel(
    signs, digits, scales, out_scale, group_scale, in_shift, out_shift, bias,
    out_scale_step, out_shift_step, bias_step, groups, y, out_features, in_features,
    W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the layer for a token."""
    begin_next(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    there = rows < out_features
    words = load_words(signs, rows, there, W, CHUNK)
    terms = load_terms(rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, ROWS)
    wait(PDL)
    result = multiply(
        words, terms, rows, there, digits + token * (8 * DIGITS * W), scales + token * (5 * W), group_scale, in_shift,
        out_shift, groups, in_features, 0.0, ROWS, CHUNK, W, ALL, DIGITS, False, PTX,
    )  # fmt: skip
    tl.store(y + token * out_features + rows, result.to(y.dtype.element_ty), mask=there)
