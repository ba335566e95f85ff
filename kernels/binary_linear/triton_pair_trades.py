"""What the threads of a pair of programs trade: a warp its planes, and both programs sums of rows.

A pair is a cluster of two, each with half of SPLIT warps; threads are counted through both. A program writes its sums
where the other waits for them, by stores that count what has come on a barrier there. So no memory has to be seen by
all before anyone goes on, which under load takes longer than all the rest.

Legend as in `triton_trades`. PARTS are a thread's counts of rows: two of 16 rows, which four columns have parts of.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.binary_linear.triton_counts import stack
from bimamba_lit.kernels.binary_linear.triton_trades import operands, trade_text
from bimamba_lit.kernels.binary_linear.triton_word_counts import across

HEAD = tl.constexpr(4)  # words of a room before its sums: the barrier


@triton.constexpr_function
def halves_text(SPLIT):
    """Return the text of `trade_halves`: operands are what is taken, what was made, and where both are."""
    apart = 16 * SPLIT + 4
    stores = [(apart * plane, f"${8 + plane}") for plane in range(8)]
    loads = [(4 * half, [f"${4 * half + n}" for n in range(4)]) for half in range(2)]
    return "{" + trade_text(8 * apart, stores, loads, 16, "bar.warp.sync 0xffffffff") + "}"


@triton.jit
def trade_halves(made, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Return, of the 8 planes that a warp's threads made, what eight made of a thread's line."""
    THREADS: tl.constexpr = 32 * SPLIT
    thread = tl.arange(0, THREADS)
    line, maker = thread % 32 // 4, thread // 32 * 32 + thread % 4 * 8
    if PTX:
        own, other = thread % (THREADS // 2), maker % (THREADS // 2) + line * (THREADS // 2 + 4)
        return tl.inline_asm_elementwise(
            halves_text(SPLIT), operands(8, 10), made + (own, other), (tl.int32,) * 8, is_pure=False, pack=1
        )
    else:
        flat = tl.reshape(stack(made), [THREADS * 8])
        taken = ()
        for n in tl.static_range(8):
            taken = taken + (tl.gather(flat, (maker + n) * 8 + line, 0),)
        return taken


@triton.constexpr_function
def pitch_of(ROWS, SPLIT):
    """Return how far a room's sums by warps are apart, such that lanes meet in no bank."""
    return ROWS // 2 + ROWS // SPLIT


@triton.constexpr_function
def room_text(ROWS, SPLIT, SUMS):
    """Return the text of `open_room`: operands are the room's address and the thread of its program."""
    words = SPLIT * (ROWS // 2 + 2 * SUMS)
    size = HEAD.value + SPLIT * (pitch_of(ROWS, SPLIT) + 2)
    return (
        f"{{.shared .align 16 .b32 room[{size}]; .reg .pred first; mov.u32 $0, room; setp.eq.u32 first, $1, 0; "
        "@first mbarrier.init.shared::cta.b64 [room], 1; @first fence.mbarrier_init.release.cluster; "
        f"@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [room], {4 * words}; "
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;}"
    )


@triton.jit
def open_room(ROWS: tl.constexpr, SPLIT: tl.constexpr, SUMS: tl.constexpr, PTX: tl.constexpr):
    """Make a room in each program's shared memory where sums of its half of ROWS rows will come; return its address."""
    thread = tl.arange(0, 32 * SPLIT) % (16 * SPLIT)
    if PTX:
        return tl.inline_asm_elementwise(
            room_text(ROWS, SPLIT, SUMS), "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )
    else:
        return thread


@triton.jit
def halved(parts, lane, BIT: tl.constexpr, PTX: tl.constexpr):
    """Return the first half of parts, or the second where a lane has the bit, with the lane's beside it added."""
    upper = lane & BIT != 0
    HALF: tl.constexpr = len(parts) // 2
    sums = ()
    for n in tl.static_range(HALF):
        kept = tl.where(upper, parts[n + HALF], parts[n])
        given = tl.where(upper, parts[n], parts[n + HALF])
        sums = sums + (kept + across(given, lane, BIT, PTX),)
    return sums


@triton.jit
def row_of_pair(ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Return which of a pair's rows a thread gets from `sums_of_pair`; SHARE threads after one another the same."""
    THREADS: tl.constexpr = 32 * SPLIT
    SHARE: tl.constexpr = THREADS // ROWS
    KEPT: tl.constexpr = ROWS // 32  # of a lane's parts
    place = tl.arange(0, THREADS) // SHARE
    of_program = place % (ROWS // 2)
    upper, line, part = of_program // (8 * KEPT), of_program // KEPT % 8, of_program % KEPT
    return place // (ROWS // 2) * (ROWS // 2) + upper * (8 * KEPT) + part * 8 + line


@triton.constexpr_function
def pair_text(ROWS, SPLIT, SUMS):
    """Return the text of `sums_of_pair`.

    Operands are the sum of a row and of both terms; a lane's sums; its term; the room's address; whose rows those are;
    where they, the term and what is read lie; and the lane.
    """
    kept, share, pitch = ROWS // 32, 32 * SPLIT // ROWS, pitch_of(ROWS, SPLIT)
    first, term, head = 3, 3 + kept, 4 * HEAD.value
    room, whose, to, term_to, at, lane = (f"${term + 1 + n}" for n in range(6))
    terms = head + 4 * SPLIT * pitch
    found = [f"found{n}" for n in range(SPLIT // share)]
    text = f"{{.reg .b32 to, barrier, at; .reg .pred done, has; .reg .f32 other, {', '.join(found)}, a, b, c, d; "
    text += f"mapa.shared::cluster.u32 barrier, {room}, {whose}; mad.lo.u32 to, {to}, 4, barrier; "
    kind = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
    for n in range(0, kept, min(4, kept)):
        names = ", ".join(f"${first + n + m}" for m in range(min(4, kept)))
        text += f"{kind}.v{min(4, kept)}.b32 [to + {head + 4 * n}], {{{names}}}, [barrier]; "
    if SUMS:
        text += f"mad.lo.u32 to, {term_to}, 4, barrier; setp.lt.u32 has, {lane}, 4; "
        text += f"@has {kind}.b32 [to + {terms}], ${term}, [barrier]; "
    text += f"WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [{room}], 0; @!done bra WAIT; "
    text += f"mad.lo.u32 at, {at}, 4, {room}; "
    for n, name in enumerate(found):
        text += f"ld.shared.f32 {name}, [at + {head + 4 * n * share * pitch}]; "
    text += f"mov.f32 $0, {found[0]}; " + "".join(f"add.f32 $0, $0, {name}; " for name in found[1:])
    for by in (1 << n for n in range(share.bit_length() - 1)):
        text += f"shfl.sync.bfly.b32 other, $0, {by}, 31, -1; add.f32 $0, $0, other; "
    text += "mov.b32 $1, 0; mov.b32 $2, 0; "
    for n in range(SPLIT // 2 if SUMS else 0):
        text += f"ld.shared.v4.f32 {{a, b, c, d}}, [{room} + {terms + 16 * n}]; "
        text += "add.f32 a, a, c; add.f32 b, b, d; add.f32 $1, $1, a; add.f32 $2, $2, b; "
    return text + "}"


@triton.constexpr_function
def pair_operands(KEPT):
    """Return the constraints of `pair_text`."""
    return ",".join(["=&f"] * 3 + ["f"] * (KEPT + 1) + ["r"] * 6)


@triton.jit
def sums_of_pair(
    parts, step, total, shifted, room, ROWS: tl.constexpr, SPLIT: tl.constexpr, SUMS: tl.constexpr, PTX: tl.constexpr
):
    """Add up integers that threads have of ROWS rows, each warp's times its step; and, with SUMS, two terms of each.

    A thread gets the sum of `row_of_pair`, and the terms'. A warp's terms are those of its lanes 0 and 1, and 2 and 3.
    """
    THREADS: tl.constexpr = 32 * SPLIT
    SHARE: tl.constexpr = THREADS // ROWS
    KEPT: tl.constexpr = ROWS // 32
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    if PTX:
        PITCH: tl.constexpr = pitch_of(ROWS, SPLIT)
        kept = halved(halved(parts, lane, 1, PTX), lane, 2, PTX)
        sums = ()
        for n in tl.static_range(KEPT):
            sums = sums + (kept[n].to(tl.float32) * step,)
        warp, upper = thread // 32, lane // 2 % 2
        own = thread % (THREADS // 2)
        to = warp * PITCH + (upper * 8 + lane // 4) * KEPT
        at = own % SHARE * PITCH + own // SHARE
        term = tl.where(upper == 0, total, shifted)
        return tl.inline_asm_elementwise(
            pair_text(ROWS, SPLIT, SUMS), pair_operands(KEPT),
            sums + (term, room, lane % 2, to, warp * 2 + upper, at, lane), (tl.float32,) * 3, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        each = tl.permute(tl.reshape(stack(parts), [SPLIT, 8, 4, ROWS // 8]), [3, 1, 0, 2])
        sums = tl.sum(tl.reshape(each, [ROWS, SPLIT, 4]), 2).to(tl.float32)
        steps = tl.sum(tl.reshape(tl.where(lane == 0, step, 0.0), [SPLIT, 32]), 1)
        sums = tl.sum(sums * steps[None, :], 1)
        whole, moved = tl.sum(tl.where(lane == 0, total, 0.0), 0), tl.sum(tl.where(lane == 2, shifted, 0.0), 0)
        return tl.gather(sums, row_of_pair(ROWS, SPLIT), 0), total * 0 + whole, shifted * 0 + moved
