"""The instructions by which signs become what Hopper's sparse tensor cores take, carried out one by one on a CPU."""

import re
import subprocess
import sys

import numpy as np
import pytest

sparse = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_hopper_sparse")
gl = pytest.importorskip("triton.experimental.gluon.language")

TOKENS, INPUTS, GROUP, STEP = 16, 128, 1, 7 * 1024
LOP3 = {0xF0: 0xF0F0F0F0, 0xCC: 0xCCCCCCCC, 0xAA: 0xAAAAAAAA}


def number(text, registers):
    return np.uint32(int(text, 0)) if re.match(r"-?\d", text) else registers[text]


def lop3(a, b, c, table):
    found = np.zeros_like(a)
    for case in range(8):
        if int(table) >> case & 1:
            found |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return found


def prmt(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    chosen = [both >> np.uint64(8 * (int(selector) >> 4 * n & 7)) & np.uint64(255) for n in range(4)]
    return sum(byte << np.uint64(8 * n) for n, byte in enumerate(chosen)).astype(np.uint32)


OPERATIONS = {
    "mov.u32": lambda a: a,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda a, b, c: b << (c & np.uint32(31)) | a >> (-c & np.uint32(31)),  # of one twice: a rotation
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def right_operand(memory, registers):
    """Return the inputs (32, tokens) that a matrix descriptor means: rows of 128 bytes, in a swizzle of 128 bytes."""
    low, high = registers
    assert high == 0x40000040  # 8 rows are 1,024 bytes, swizzle of 128 bytes
    start = int(low & np.uint32(0x3FFF)) * 16
    place = start + 128 * np.arange(TOKENS)[None, :] + 2 * np.arange(32)[:, None]
    place ^= place >> 3 & 0x70
    return (memory.view(np.uint16)[place // 2].astype(np.uint32) << 16).view(np.float32)


def sparse_product(sums, left, right, chosen, selector):
    """Add (64, 32) times (32, tokens), of which each quad's threads have rows r and r + 8, as a GPU was seen to."""
    for thread in range(128):
        warp, row, t = thread // 32 * 16, thread % 32 // 4, thread % 4
        for register in range(4):
            at, group = warp + row + register % 2 * 8, t + register // 2 * 4
            holder = thread - t + 2 * selector + group // 4
            nibble = int(chosen[holder]) >> (16 * (register % 2) + 4 * (group % 4)) & 15
            places = nibble & 3, nibble >> 2
            assert places[0] < places[1], "undefined"
            for n, place in enumerate(places):
                bits = np.array([int(left[register][thread]) >> 16 * n << 16 & 0xFFFFFFFF], dtype=np.uint32)
                sums[at] += bits.view(np.float32)[0] * right[4 * group + place]


def carry_out(text, memory):
    """Return the sums (64, tokens) that a step's text adds to none."""
    thread = np.arange(GROUP * 128, GROUP * 128 + 128, dtype=np.uint32)
    zero = np.zeros(128, np.uint32)
    registers = {"global_smem": zero, "%tid.x": thread, f"${TOKENS}": zero + np.uint32(STEP)}
    sums = np.zeros((64, TOKENS), np.float32)
    for line in re.split(r"[;\n]", text.strip("{}\n ")):
        name, _, rest = line.strip().partition(" ")
        words = re.findall(r"[$%\w.]+", rest)
        if name in OPERATIONS:
            found = OPERATIONS[name](*(number(word, registers) for word in words[1:]))
            registers[words[0]] = np.broadcast_to(found, 128).astype(np.uint32)
        elif name == "ld.shared.v4.b32":
            place = registers[words[4]] + np.uint32(int(words[5]))
            for n in range(4):
                registers[words[n]] = memory.view(np.uint32)[place // 4 + n]
        elif name == "mov.b64":
            registers[words[0]] = registers[words[1]][0], int(words[2], 0)
        elif name.startswith("wgmma.mma_async.sp"):
            assert words[: TOKENS // 2] == [f"${n}" for n in range(TOKENS // 2)]
            *left, right, chosen, selector = words[TOKENS // 2 : TOKENS // 2 + 7]
            sparse_product(
                sums, [registers[name] for name in left], right_operand(memory, registers[right]), registers[chosen],
                int(selector),
            )  # fmt: skip
            assert words[-4:] == ["1", "1", "1", "0"]
        else:
            assert name.startswith((".reg", "wgmma.", "//")) or not name, line
    return sums


def paired(x):
    """Return sums and differences of inputs p = 16 h + 4 c + k and p + 32, in their order: at 16 k + 4 c + 2 h."""
    words = x.reshape(-1, INPUTS // 64, 2, 2, 4, 4)
    both = np.stack([words[:, :, 0] + words[:, :, 1], words[:, :, 0] - words[:, :, 1]], -1)
    return both.transpose(0, 1, 4, 3, 2, 5).reshape(len(x), INPUTS)


@np.errstate(over="ignore")
def test_a_step_is_the_product_of_its_signs_and_tokens():
    random = np.random.default_rng(0)
    x = random.integers(-9, 10, (TOKENS, INPUTS)).astype(np.float32)
    bits = random.integers(0, 2, (64, INPUTS))
    memory = np.zeros(STEP + 256 * TOKENS + 1024 * (GROUP + 1), np.uint8)
    words = memory[STEP + 256 * TOKENS + 1024 * GROUP :]
    words[:] = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
    place = 128 * TOKENS * np.arange(2)[:, None, None] + 128 * np.arange(TOKENS)[:, None] + 2 * np.arange(64)
    place += STEP
    place ^= place >> 3 & 0x70
    halves = (paired(x).view(np.uint32) >> 16).astype(np.uint16)
    memory.view(np.uint16)[place // 2] = halves.reshape(TOKENS, 2, 64).transpose(1, 0, 2)
    text = sparse._product_text.fn(gl.bfloat16, TOKENS, GROUP)
    assert np.array_equal(carry_out(text, memory), (2 * bits - 1) @ x.T)


def test_a_triton_that_was_not_tried_takes_the_dense_weight():
    code = """
import sys, torch, triton
triton.__version__ = sys.argv[1]
from bimamba_lit.kernels.binary_linear import triton as layer
from bimamba_lit.kernels.configurations import compiling_for
with compiling_for("sm_90"):
    able = layer._hopper_can(torch.empty(4096, 2560, dtype=torch.bfloat16, device="meta"), 2560, None)
print(able, any(name.startswith("triton.experimental.gluon.language.nvidia.hopper") for name in sys.modules))
"""
    for version, printed in (("3.7.1", "True True"), ("3.9.0", "False False")):
        run = subprocess.run([sys.executable, "-c", code, version], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == printed
