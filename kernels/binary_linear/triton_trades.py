"""What the threads of a program trade by way of shared memory: one store, one barrier and one load each.

The compiler takes several rounds for these, and sends eight lanes to a bank. So instructions are written here, as texts
for tensors of one element a thread, in order; what lies in memory is so far apart that lanes do not meet in a bank. A
text's memory is its own, so none is written while others still read. Without PTX the same is said in Triton's terms.

Legend: THREADS = 32 SPLIT threads in SPLIT warps; `triton_counts` has lines, columns and steps.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.binary_linear.triton_counts import stack


@triton.constexpr_function
def operands(outputs, inputs):
    """Return the constraints of a text with so many operands, each 32 bits."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def trade_text(words, stores, loads, first, barrier="bar.sync 0"):
    """Return the text of a trade in a room of `words` words.

    `stores` are pairs of a place and what is stored there, `loads` of a place and the names of words after one another.
    Places count from the operand `first` in stores, and from the one after in loads.
    """
    text = f".shared .align 16 .b32 room[{words}]; .reg .b32 room_at, at; mov.u32 room_at, room; "
    text += f"mad.lo.u32 at, ${first}, 4, room_at; "
    text += "".join(f"st.shared.b32 [at + {4 * place}], {name}; " for place, name in stores)
    text += f"{barrier}; mad.lo.u32 at, ${first + 1}, 4, room_at; "
    for place, names in loads:
        vector = f".v{len(names)}" if len(names) > 1 else ""
        text += f"ld.shared{vector}.b32 {{{', '.join(names)}}}, [at + {4 * place}]; "
    return text


@triton.constexpr_function
def _consecutive(names):
    """Return the loads of words after one another, four at a time where there are as many."""
    width = min(4, len(names))
    return [(n, names[n : n + width]) for n in range(0, len(names), width)]


@triton.constexpr_function
def largest_text(SPLIT):
    """Return the text of `largest_of_all`: operands are the result, the threads' own, their warp, and 0."""
    found = [f"found{n}" for n in range(SPLIT)]
    text = f"{{.reg .b32 own, {', '.join(found)}; redux.sync.max.s32 own, $1, -1; "
    text += trade_text(SPLIT, [(0, "own")], _consecutive(found), 2) + f"mov.b32 $0, {found[0]}; "
    return text + "".join(f"max.s32 $0, $0, {name}; " for name in found[1:]) + "}"


@triton.jit
def largest_of_all(own, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Return the largest integer of all threads."""
    if PTX:
        warp = tl.arange(0, 32 * SPLIT) // 32
        return tl.inline_asm_elementwise(
            largest_text(SPLIT), operands(1, 3), [own, warp, tl.zeros_like(own)], tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.zeros_like(own) + tl.max(own, 0)


@triton.jit
def largest_of_warp(own, PTX: tl.constexpr):
    """Return the largest integer of a warp."""
    if PTX:
        return tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, -1;", "=r,r", [own], tl.int32, is_pure=True, pack=1
        )
    else:
        warps: tl.constexpr = own.shape[0] // 32
        largest = tl.max(tl.reshape(own, [warps, 32]), 1)
        return tl.reshape(tl.broadcast_to(largest[:, None], [warps, 32]), [32 * warps])


@triton.constexpr_function
def planes_text(SPLIT, STEPS, PLANES):
    """Return the text of `trade_planes`: operands are what is taken, what was made, and where both are."""
    digits, apart = PLANES // 8, 32 * SPLIT + 16
    taken = 4 * digits * STEPS
    stores = [(apart * plane, f"${taken + plane}") for plane in range(PLANES)]
    loads = [
        (16 * step + 8 * apart * digit, [f"${4 * (step * digits + digit) + n}" for n in range(4)])
        for step in range(STEPS)
        for digit in range(digits)
    ]
    return "{" + trade_text(PLANES * apart, stores, loads, taken + PLANES, "bar.warp.sync 0xffffffff") + "}"


@triton.jit
def trade_planes(made, SPLIT: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr):
    """Return, of the planes that a warp's threads made, what four made of a thread's line, for each step and digit."""
    THREADS: tl.constexpr = 32 * SPLIT
    PLANES: tl.constexpr = len(made)
    TAKEN: tl.constexpr = PLANES // 2 * STEPS
    thread = tl.arange(0, THREADS)
    line, maker = thread % 32 // 4, thread // 32 * 32 + thread % 4 * 4
    if PTX:
        return tl.inline_asm_elementwise(
            planes_text(SPLIT, STEPS, PLANES), operands(TAKEN, PLANES + 2),
            made + (thread, maker + line * (THREADS + 16)), (tl.int32,) * TAKEN, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        flat = tl.reshape(stack(made), [THREADS * PLANES])
        taken = ()
        for n in tl.static_range(TAKEN):
            at = maker + n // (PLANES // 2) * 16 + n % 4
            taken = taken + (tl.gather(flat, at * PLANES + n // 4 % (PLANES // 8) * 8 + line, 0),)
        return taken


@triton.constexpr_function
def rows_text(PARTS, SPLIT, SHARE):
    """Return the text of `row_sums`: operands are the result, the parts, and where they and a thread's share are."""
    found, pitch = [f"found{n}" for n in range(PARTS)], 4 * SPLIT + 4
    stores = [(8 * pitch * part, f"${1 + part}") for part in range(PARTS)]
    text = f"{{.reg .b32 other, {', '.join(found)}; "
    text += trade_text(8 * pitch * PARTS, stores, _consecutive(found), 1 + PARTS) + f"mov.b32 $0, {found[0]}; "
    text += "".join(f"add.s32 $0, $0, {name}; " for name in found[1:])
    lanes = 1
    while lanes < SHARE:
        text += f"shfl.sync.bfly.b32 other, $0, {lanes}, 31, -1; add.s32 $0, $0, other; "
        lanes *= 2
    return text + "}"


@triton.jit
def row_sums(parts, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Add up integers that threads have of rows, a part of 8 rows a line each: threads share a row and get the same."""
    THREADS: tl.constexpr = 32 * SPLIT
    PARTS: tl.constexpr = len(parts)
    SHARE: tl.constexpr = THREADS // (8 * PARTS)
    if PTX:
        thread = tl.arange(0, THREADS)
        to = thread % 32 // 4 * (4 * SPLIT + 4) + thread // 32 * 4 + thread % 4
        at = thread // SHARE * (4 * SPLIT + 4) + thread % SHARE * PARTS
        return tl.inline_asm_elementwise(
            rows_text(PARTS, SPLIT, SHARE), operands(1, PARTS + 2), parts + (to, at), tl.int32, is_pure=False, pack=1
        )
    else:
        each = tl.permute(tl.reshape(stack(parts), [SPLIT, 8, 4, PARTS]), [3, 1, 0, 2])
        sums = tl.sum(tl.reshape(each, [8 * PARTS, SPLIT * 4]), 1)
        return tl.reshape(tl.broadcast_to(sums[:, None], [8 * PARTS, SHARE]), [THREADS])


@triton.constexpr_function
def steps_text(PARTS, SPLIT, SHARE):
    """Return the text of `row_sums_of_steps`: operands are those of `rows_text`, a step, a place."""
    found, pitch = [f"found{n}" for n in range(PARTS)], 4 * SPLIT + 4
    steps, apart = [f"step{n}" for n in range(max(1, PARTS // 4))], 8 * pitch
    stores = [(apart * part, f"${1 + part}") for part in range(PARTS + 1)]
    text = f"{{.reg .b32 {', '.join(found)}; .reg .f32 sum, other, {', '.join(steps)}; "
    text += trade_text(apart * (PARTS + 1), stores, _consecutive(found), 2 + PARTS)
    text += f"mad.lo.u32 at, ${4 + PARTS}, 4, room_at; "
    for n, step in enumerate(steps):
        text += f"ld.shared.b32 {step}, [at + {4 * (apart * PARTS + 4 * n)}]; "
    for n, step in enumerate(steps):
        first, *more = found[4 * n : 4 * n + 4]
        text += "".join(f"add.s32 {first}, {first}, {name}; " for name in more) + f"cvt.rn.f32.s32 other, {first}; "
        text += f"fma.rn.f32 sum, other, {step}, sum; " if n else f"mul.f32 sum, other, {step}; "
    lanes = 1
    while lanes < SHARE:
        text += f"shfl.sync.bfly.b32 other, sum, {lanes}, 31, -1; add.f32 sum, sum, other; "
        lanes *= 2
    return text + "mov.b32 $0, sum;}"


@triton.jit
def row_sums_of_steps(parts, step, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Add up what `row_sums` does, each warp's integers times its step."""
    THREADS: tl.constexpr = 32 * SPLIT
    PARTS: tl.constexpr = len(parts)
    SHARE: tl.constexpr = THREADS // (8 * PARTS)
    if PTX:
        thread = tl.arange(0, THREADS)
        to = thread % 32 // 4 * (4 * SPLIT + 4) + thread // 32 * 4 + thread % 4
        own = thread % SHARE * PARTS
        sums = tl.inline_asm_elementwise(
            steps_text(PARTS, SPLIT, SHARE), operands(1, PARTS + 4),
            parts + (step.to(tl.int32, bitcast=True), to, thread // SHARE * (4 * SPLIT + 4) + own, own), tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        return sums.to(tl.float32, bitcast=True)
    else:
        each = tl.permute(tl.reshape(stack(parts), [SPLIT, 8, 4, PARTS]), [3, 1, 0, 2])
        sums = tl.sum(tl.reshape(each, [8 * PARTS, SPLIT, 4]), 2).to(tl.float32)
        steps = tl.sum(tl.reshape(tl.where(tl.arange(0, THREADS) % 32 == 0, step, 0.0), [SPLIT, 32]), 1)
        sums = tl.sum(sums * steps[None, :], 1)
        return tl.reshape(tl.broadcast_to(sums[:, None], [8 * PARTS, SHARE]), [THREADS])


@triton.constexpr_function
def float_sums_text(ROWS, SPLIT):
    """Return the text of `float_sums`: operands are the five results, two parts, a warp's sum, and three places."""
    pitch, warps = sums_pitch(SPLIT), ROWS // 16 * SPLIT
    totals = 4 * ROWS * pitch
    text = f"{{.shared .align 16 .b32 room[{ROWS * pitch + 4 * warps}]; .reg .b32 room_at, at; .reg .f32 a, b, c, d; "
    text += "mov.u32 room_at, room; mad.lo.u32 at, $8, 4, room_at; "
    text += f"st.shared.f32 [at + 0], $5; st.shared.f32 [at + {32 * pitch}], $6; "
    text += f"mad.lo.u32 at, $9, 4, room_at; st.shared.f32 [at + {totals}], $7; bar.sync 0; "
    text += "mad.lo.u32 at, $10, 4, room_at; ld.shared.v4.f32 {a, b, c, d}, [at + 0]; "
    text += "add.f32 a, a, b; add.f32 c, c, d; add.f32 $0, a, c; "
    for vector in range(1, SPLIT):
        text += f"ld.shared.v4.f32 {{a, b, c, d}}, [at + {16 * vector}]; "
        text += "add.f32 a, a, b; add.f32 c, c, d; add.f32 a, a, c; add.f32 $0, $0, a; "
    text += f"ld.shared.v4.f32 {{$1, $2, $3, $4}}, [room_at + {totals}]; "
    for warp in range(1, warps):
        text += f"ld.shared.v4.f32 {{a, b, c, d}}, [room_at + {totals + 16 * warp}]; "
        text += "add.f32 $1, $1, a; add.f32 $2, $2, b; add.f32 $3, $3, c; add.f32 $4, $4, d; "
    return text + "}"


@triton.constexpr_function
def sums_pitch(SPLIT):
    """Return how far rows are apart, such that lanes meet in no bank."""
    return 4 * SPLIT + 4 * (SPLIT % 2 == 0)


@triton.jit
def float_sums(parts, own, ROWS: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Add up what threads have of rows, two parts of a line each in a group of SPLIT warps, and four sums of warps.

    Thread t gets the sum of row t % ROWS, and the four of all warps. A warp's four are `own` of its lanes 0 to 3, and
    the same again in the others.
    """
    WARPS: tl.constexpr = ROWS // 16 * SPLIT
    thread = tl.arange(0, 32 * WARPS)
    if PTX:
        PITCH: tl.constexpr = sums_pitch(SPLIT)
        warp, lane = thread // 32, thread % 32
        to = (warp // SPLIT * 16 + lane // 4) * PITCH + warp % SPLIT * 4 + lane % 4
        return tl.inline_asm_elementwise(
            float_sums_text(ROWS, SPLIT), "=&f,=&f,=&f,=&f,=&f,f,f,f,r,r,r",
            [parts[0], parts[1], own, to, warp * 4 + lane % 4, thread % ROWS * PITCH],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        each = tl.permute(tl.reshape(stack(parts), [ROWS // 16, SPLIT, 8, 4, 2]), [0, 4, 2, 1, 3])
        rows = tl.sum(tl.reshape(each, [ROWS, 4 * SPLIT]), 1)
        found = (tl.reshape(tl.broadcast_to(rows[None, :], [2 * SPLIT, ROWS]), [32 * WARPS]),)
        for n in tl.static_range(4):
            found = found + (tl.zeros_like(own) + tl.sum(tl.where(thread % 32 == n, own, 0.0), 0),)
        return found
