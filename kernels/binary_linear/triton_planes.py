"""Inputs as planes: bits of fixed-point numbers, one plane a place, which tensor cores count together with signs.

Tensors have one element a thread; what a thread has more of are tuples. Without PTX the same is said in Triton's terms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_counts import four


def aligned(values: Tensor | None, in_features: int) -> Tensor | None:
    """Return values (…, I), or (1,), of every input, and such that a load of 16 bytes may begin with a row's first.

    Only then does a thread have 8 after one another.
    """
    if values is None:
        return None
    values = values.expand(*values.shape[:-1], in_features)
    if values.is_contiguous() and values.data_ptr() % 16 == 0:
        return values
    return values.clone(memory_format=torch.contiguous_format)


@triton.jit
def fetch(at, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """Ask for SIZE elements into the farther cache, where what is written meanwhile is seen: a line a warp."""
    LINE: tl.constexpr = 1024 // at.dtype.element_ty.primitive_bitwidth
    line = tl.program_id(0) * WARPS + tl.arange(0, 32 * WARPS) // 32
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // no result $0", "=r,l", [(at + line * LINE % SIZE).to(tl.uint64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_numbers(at, inside, PTX: tl.constexpr):
    """Load numbers as float32."""
    value = tl.load(at, mask=inside, other=0.0)
    if PTX and value.dtype == tl.bfloat16:
        # An instruction a number, where the compiler has one and a half.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value], tl.float32, is_pure=True, pack=2
        )
    else:
        return value.to(tl.float32)


@triton.constexpr_function
def load_text(DTYPE):
    """Return the text of `load_eight`: operands are what is loaded, the address, and whether to load."""
    kind = str(DTYPE)
    text = "{.reg .pred wanted; .reg .b32 a, b, c, d; .reg .b16 low, high; setp.ne.b32 wanted, $9, 0; "
    for first in range(0, 8, 4) if kind == "fp32" else (0,):
        text += "".join(f"mov.b32 {name}, 0; " for name in "abcd")
        text += f"@wanted ld.global.v4.b32 {{a, b, c, d}}, [$8 + {4 * first}]; "
        for n, name in enumerate("abcd"):
            if kind == "fp32":
                text += f"mov.b32 ${first + n}, {name}; "
            elif kind == "bf16":
                text += f"shl.b32 ${2 * n}, {name}, 16; and.b32 ${2 * n + 1}, {name}, 0xffff0000; "
            else:
                text += f"mov.b32 {{low, high}}, {name}; cvt.f32.f16 ${2 * n}, low; cvt.f32.f16 ${2 * n + 1}, high; "
    return text + "}"


@triton.jit
def load_eight(at, inside, PTX: tl.constexpr):
    """Load 8 numbers from an address of a thread's own, a multiple of 16 bytes, as float32, or zeros."""
    THREADS: tl.constexpr = at.shape[0]
    if PTX:
        constraints: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,r"
        return tl.inline_asm_elementwise(
            load_text(at.dtype.element_ty),
            constraints,
            [at.to(tl.uint64), inside.to(tl.int32)],
            (tl.float32,) * 8,
            is_pure=False,
            pack=1,
        )
    else:
        return eight(
            tl.load(at[:, None] + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0.0).to(tl.float32), THREADS
        )


@triton.jit
def larger(a, b):
    """Return the larger of two, or what is not a number."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def bytes_text(SELECT):
    """Return the text of `bytes_of`."""
    return f"prmt.b32 $0, $1, $2, {SELECT};"


@triton.jit
def bytes_of(a, b, select: tl.constexpr, PTX: tl.constexpr):
    """Return four bytes of a's and b's eight, 4 bits of `select` a byte."""
    if PTX:
        return tl.inline_asm_elementwise(bytes_text(select), "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        found = tl.zeros_like(a)
        for byte in tl.static_range(4):
            place: tl.constexpr = (select >> (4 * byte)) & 7
            found |= (((a if place < 4 else b) >> (8 * (place % 4))) & 255) << (8 * byte)
        return found


@triton.constexpr_function
def add_text(WEIGHTS, SIGNED):
    """Return the text of `add_bytes`."""
    return f"dp4a.{'s32' if SIGNED else 'u32'}.u32 $0, $1, {WEIGHTS:#x}, $2;"


@triton.jit
def add_bytes(total, bytes, WEIGHTS: tl.constexpr, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """Add integers of 8 bits to a total: those of four for which a byte of WEIGHTS is 1."""
    if PTX:
        return tl.inline_asm_elementwise(
            add_text(WEIGHTS, SIGNED), "=r,r,r", [bytes, total], tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            value = (bytes >> (8 * byte)) & 255
            value = (value ^ 128) - 128 if SIGNED else value
            total += value * ((WEIGHTS >> (8 * byte)) & 1)
        return total


@triton.jit
def eight(words, THREADS: tl.constexpr):
    """Take (THREADS, 8) apart."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 4, 2]))
    a, c, e, g = four(even, THREADS)
    b, d, f, h = four(odd, THREADS)
    return a, b, c, d, e, f, g, h


@triton.constexpr_function
def chosen_text(MASK):
    """Return the text of `chosen`."""
    return f"lop3.b32 $0, $1, $2, {MASK}, 0xE4;"


@triton.jit
def chosen(a, b, mask: tl.constexpr, PTX: tl.constexpr):
    """Return a's bits in a mask and b's beside it: an instruction, where the compiler has two."""
    if PTX:
        return tl.inline_asm_elementwise(chosen_text(mask), "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        return (a & mask) | (b & ~mask)


@triton.jit
def swap(a, b, by: tl.constexpr, mask: tl.constexpr, PTX: tl.constexpr):
    """Trade a's bits beside a mask for b's in it, `by` places lower."""
    return chosen(a, b << by, mask, PTX), chosen(a >> by, b, mask, PTX)


@triton.jit
def transposed(a, b, c, d, e, f, g, h, PTX: tl.constexpr):
    """Take numbers of 8 bits apart into planes, in each byte by itself: bit i of plane p is bit p of number i."""
    a, b = swap(a, b, 1, 0x55555555, PTX)
    c, d = swap(c, d, 1, 0x55555555, PTX)
    e, f = swap(e, f, 1, 0x55555555, PTX)
    g, h = swap(g, h, 1, 0x55555555, PTX)
    a, c = swap(a, c, 2, 0x33333333, PTX)
    b, d = swap(b, d, 2, 0x33333333, PTX)
    e, g = swap(e, g, 2, 0x33333333, PTX)
    f, h = swap(f, h, 2, 0x33333333, PTX)
    a, e = swap(a, e, 4, 0x0F0F0F0F, PTX)
    b, f = swap(b, f, 4, 0x0F0F0F0F, PTX)
    c, g = swap(c, g, 4, 0x0F0F0F0F, PTX)
    d, h = swap(d, h, 4, 0x0F0F0F0F, PTX)
    return a, b, c, d, e, f, g, h


@triton.jit
def turned(a, b, c, d, PTX: tl.constexpr):
    """Return the first bytes of four words, the second, and so on."""
    ab, cd = bytes_of(a, b, 0x5140, PTX), bytes_of(c, d, 0x5140, PTX)
    ef, gh = bytes_of(a, b, 0x7362, PTX), bytes_of(c, d, 0x7362, PTX)
    return (
        bytes_of(ab, cd, 0x5410, PTX), bytes_of(ab, cd, 0x7632, PTX),
        bytes_of(ef, gh, 0x5410, PTX), bytes_of(ef, gh, 0x7632, PTX),
    )  # fmt: skip


@triton.jit
def sum_of_warp(own, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Add up what a warp's threads have."""
    if PTX:
        return tl.inline_asm_elementwise(
            "redux.sync.add.s32 $0, $1, -1;", "=r,r", [own], tl.int32, is_pure=True, pack=1
        )
    else:
        each = tl.sum(tl.reshape(own, [SPLIT, 32]), 1)
        return tl.reshape(tl.broadcast_to(each[:, None], [SPLIT, 32]), [32 * SPLIT])
