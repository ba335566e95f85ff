"""Triton kernels of the SSD forward pass, and their launches.

Four launches: `decays` (step sizes and the decays of every chunk), `carry` (the state before every chunk), `scores`
(C B^T inside chunks, one matrix for all heads of a group) and `outputs` (what is local to a chunk). What goes through
memory between them is the states between chunks and C B^T, both in half precision where the inputs are, and five
numbers a token and head. The backward pass starts from the same three, and walks the gradients of the states with the
same kernel as the states.

Decays are powers of two of differences of `total`, the running sum of log2 decays inside a chunk. Offsets of tiles are
64-bit. No kernel has atomics: repeated runs are equal bit for bit.

Legend: B batch, L length, H heads, K heads of a group, P head width, G groups, N state size, Q tokens of a chunk,
R tokens of a part of it (Q or Q/2), c chunks, s splits of a group's heads.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import INTERPRETER, architecture, configuration, multiprocessors

# A decay below e^-60 forgets all that a float can tell; bounded totals keep the digits of their differences.
LOWEST = tl.constexpr(-60.0)
LOWEST_STEP = tl.constexpr(1e-30)  # has a logarithm, and writes nothing that a float can tell from a step of 0
LOG2_E = tl.constexpr(math.log2(math.e))
NAN = tl.constexpr(tl.PropagateNan.ALL)
# What `decays` holds of every token and head: its step size; the running sum of log2 decays; that sum less the step
# size's log2, from which a token's weight in a later one is counted; the decay since the state before the chunk; the
# decay to the state after it.
DT, TOTAL, ORIGIN, FROM_START, TO_END, PLANES = (tl.constexpr(i) for i in range(6))


class Shape(NamedTuple):
    """The sizes of a call, and what follows from them and the table of configurations."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    size: int
    chunk: int
    part: int
    precision: str

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> "Shape":
        """Return the sizes of a call with inputs x (B, L, H, P) and maps B (B, L, G, N)."""
        batch, length, heads, width = x.shape
        groups, size = B.shape[2:]
        chosen = configuration("ssd/chunk", x.dtype, block(width) * block(size), x.device)
        precision = "interpreter" if architecture(x.device) == INTERPRETER else "ieee"
        return cls(batch, length, heads, width, groups, size, chosen.blocks["Q"], chosen.blocks["R"], precision)

    def walked(self, x: Tensor) -> "Shape | None":
        """Return these sizes with the chunk that `triton_walk` takes, or None where that is not the faster way."""
        if x.device.type != "cpu" and self.batch * self.heads < 2 * multiprocessors(x.device):
            return None
        try:
            chunk = configuration("ssd/walk", x.dtype, block(self.width) * block(self.size), x.device).blocks["Q"]
        except LookupError:
            return None
        return self._replace(chunk=chunk, part=chunk)

    @property
    def chunks(self) -> int:
        """Return the number of chunks, the last of which may be partly empty."""
        return -(-self.length // self.chunk)

    @property
    def constants(self) -> dict[str, int | str]:
        """Return the compile-time constants that kernels over tiles share."""
        return {
            "P": self.width, "N": self.size, "Q": self.chunk, "BLOCK_P": block(self.width),
            "BLOCK_N": block(self.size), "PRECISION": self.precision,
        }  # fmt: skip

    def launch(self, kernel: str, x: Tensor) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return configuration(f"ssd/{kernel}", x.dtype, block(self.width) * block(self.size), x.device).launch()

    def split(self, most: int, device: torch.device) -> tuple[int, int]:
        """Return how many heads a program serves, `most` or fewer where chunks are few, and programs of a group."""
        per_group = self.heads // self.groups
        enough = 1 if architecture(device) == INTERPRETER else 4 * multiprocessors(device)
        heads = max(1, min(most, per_group * self.programs(1) // enough))
        return heads, -(-per_group // heads)

    def programs(self, splits: int) -> int:
        """Return the number of programs where each serves a part of a chunk and a split of a group's heads."""
        return self.batch * self.chunks * self.groups * splits * (self.chunk // self.part)


def block(width: int) -> int:
    """Return the tile that holds `width`: a power of two that products can take."""
    return max(16, triton.next_power_of_2(width))


def readable(t: Tensor) -> Tensor:
    """Return the tensor (B, L, ...), copied where a kernel would read it badly.

    That is where a token's features are not side by side, or a tile of a sequence would span more than 32-bit offsets.
    Kernels are compiled for the distance of tokens: it is the model's, whatever the length, and so takes no registers.
    """
    side_by_side = t.stride(-1) == 1 or t.shape[-1] == 1
    return t if side_by_side and all(stride < 2**22 for stride in t.stride()[1:]) else t.contiguous()


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):
    """Load a tile, zero outside of the counts."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def product(left, right, sums, PRECISION: tl.constexpr):
    """Multiply tiles, and add to sums if given."""
    if PRECISION == "interpreter":  # which multiplies no bfloat16
        result = tl.dot(left.to(tl.float32), right.to(tl.float32), sums)
    else:
        result = tl.dot(left, right, sums, input_precision=PRECISION)
    return result


@triton.jit
def weight_of_input(D_ptr, p, D_p: tl.constexpr, P: tl.constexpr):
    """Load D of a head: one number, or one for every feature."""
    if D_p == 0:
        return tl.load(D_ptr)
    else:
        return tl.load(D_ptr + p * D_p, mask=p < P, other=0.0)[None, :]


@triton.jit
def bounded_exp2(x):
    """Return 2^x, finite where the tokens' order forbids that it counts; masks in a loop would take registers."""
    return tl.exp2(tl.minimum(x, 64.0))


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr):
    """Softplus, exact for the smallest values too, and clamp."""
    if SOFTPLUS:
        power = tl.exp(tl.minimum(raw, 20.0, propagate_nan=NAN))
        wide = 1.0 + power
        rounded = wide - 1.0
        log1p = tl.where(rounded == 0.0, power, tl.log(wide) * (power / tl.where(rounded == 0.0, 1.0, rounded)))
        raw = tl.where(raw > 20.0, raw, log1p)
    return tl.minimum(tl.maximum(raw, low, propagate_nan=NAN), high, propagate_nan=NAN)


@triton.jit
def place(heads, per_group, chunks, splits, heads_each, PARTS: tl.constexpr):
    """Return a program's part of a chunk, chunk, sequence, group, and heads from and to; one chunk's are neighbours."""
    part, rest = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    split, rest = rest % splits, rest // splits
    groups = heads // per_group
    group, rest = rest % groups, rest // groups
    begin = group * per_group + split * heads_each
    end = tl.minimum(begin + heads_each, (group + 1) * per_group)
    return part, rest % chunks, (rest // chunks).to(tl.int64), group, begin, end


@triton.jit
def decays_kernel(
    dt_ptr, A_ptr, bias_ptr, documents_ptr, decays_ptr,
    length, heads, chunks, low, high, dt_b, dt_l, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BRIEF: tl.constexpr, Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write what `decays` or, where BRIEF, `totals` returns."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    rows, h = tl.arange(0, Q), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    left = length - chunk * Q
    there = h < heads
    source = dt_ptr + b.to(tl.int64) * dt_b + chunk.to(tl.int64) * Q * dt_l
    raw = load_tile(source, rows, h, dt_l, dt_h, left, heads).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=there, other=0.0)[None, :]
    dt = tl.where(rows[:, None] < left, step_size(raw, low, high, SOFTPLUS), 0.0)
    log_decay = tl.maximum(dt * tl.load(A_ptr + h, mask=there, other=0.0)[None, :], LOWEST, propagate_nan=NAN) * LOG2_E
    total = tl.cumsum(log_decay, 0)
    origin = total - tl.log2(tl.maximum(dt, LOWEST_STEP))
    if BRIEF:
        out = decays_ptr + (((b * heads + h).to(tl.int64) * chunks + chunk) * (2 * Q))[None, :] + rows[:, None]
        tl.store(out, total, mask=there[None, :])
        tl.store(out + Q, origin, mask=there[None, :])
        return
    from_start = tl.exp2(total)
    to_end = tl.exp2(tl.sum(log_decay, 0)[None, :] - total)
    if HAS_DOCUMENTS:
        documents = documents_ptr + b.to(tl.int64) * length + chunk * Q
        here = tl.load(documents + tl.minimum(rows, left - 1))
        before = tl.load(documents - tl.minimum(chunk, 1))
        last = tl.load(documents + tl.minimum(Q, left) - 1)
        from_start = tl.where((here == before)[:, None], from_start, 0.0)
        to_end = tl.where((here == last)[:, None], to_end, 0.0)
    out = decays_ptr + (((b * heads + h).to(tl.int64) * chunks + chunk) * (PLANES * Q))[None, :] + rows[:, None]
    tl.store(out + DT * Q, dt, mask=there[None, :])
    tl.store(out + TOTAL * Q, total, mask=there[None, :])
    tl.store(out + ORIGIN * Q, origin, mask=there[None, :])
    tl.store(out + FROM_START * Q, from_start, mask=there[None, :])
    tl.store(out + TO_END * Q, to_end, mask=there[None, :])


@triton.jit
def carry_kernel(
    value_ptr, map_ptr, decays_ptr, start_ptr, states_ptr, end_ptr, before_ptr, passed_ptr,
    length, heads, per_group, chunks,
    value_b, value_l: tl.constexpr, value_h, value_p, map_b, map_l: tl.constexpr, map_g, map_n,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of one head and write the state before each, (B, c, H, P, N), and after the last.

    Forward, values are x, maps B, and a token counts with its step size and its decay to the chunk's end. In reverse,
    values are gradients of y, maps C, and a token counts with its decay from the chunk's start; and from the states
    before every chunk, the gradient of the chunk's whole log decay through the state is written, by block of the state.
    """
    # The blocks of a state are neighbours: they read the same tokens.
    P_BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    part, whole = tl.program_id(0) % (P_BLOCKS * N_BLOCKS), (tl.program_id(0) // (P_BLOCKS * N_BLOCKS)).to(tl.int64)
    b, h = whole // heads, whole % heads
    p = part // N_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = part % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, Q)
    cells = p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    values = value_ptr + b * value_b + h * value_h
    maps = map_ptr + b * map_b + h // per_group * map_g
    decays_ptr += whole * chunks * (PLANES * Q)
    of_chunk = (b * chunks * heads + h) * (P * N) + cells
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + whole * (P * N) + cells, mask=inside, other=0.0).to(tl.float32)
    first_of_all = tl.cast(chunks - 1 if REVERSE else 0, tl.int64)
    across = tl.load(decays_ptr + first_of_all * (PLANES * Q) + FROM_START * Q + Q - 1)
    if REVERSE:
        before = tl.load(before_ptr + of_chunk + first_of_all * heads * (P * N), mask=inside, other=0.0)
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = tl.cast(chunks - 1 - step if REVERSE else step, tl.int64)
        next_chunk = tl.maximum(chunk - 1, 0) if REVERSE else tl.minimum(chunk + 1, chunks - 1)
        first = chunk * Q
        left = (length - first).to(tl.int32)
        decays = decays_ptr + chunk * (PLANES * Q)
        tl.store(states_ptr + of_chunk + chunk * heads * (P * N), state.to(states_ptr.dtype.element_ty), mask=inside)
        next_across = tl.load(decays_ptr + next_chunk * (PLANES * Q) + FROM_START * Q + Q - 1)
        if REVERSE:
            next_before = tl.load(before_ptr + of_chunk + next_chunk * heads * (P * N), mask=inside, other=0.0)
            weight = tl.load(decays + FROM_START * Q + rows)
        else:
            weight = tl.load(decays + DT * Q + rows) * tl.load(decays + TO_END * Q + rows)
        value = load_tile(values + first * value_l, p, rows, value_p, value_l, P, left)
        value = (value.to(tl.float32) * weight[None, :]).to(states_ptr.dtype.element_ty)
        mapped = load_tile(maps + first * map_l, rows, n, map_l, map_n, left, N).to(states_ptr.dtype.element_ty)
        state *= across
        across = next_across
        if REVERSE:
            passed = passed_ptr + (whole * chunks + chunk) * (P_BLOCKS * N_BLOCKS) + part
            tl.store(passed, tl.sum(before.to(tl.float32) * state))
            before = next_before
        state = product(value, mapped, state, PRECISION)
    tl.store(end_ptr + whole * (P * N) + cells, state, mask=inside)


@triton.jit
def scores_kernel(
    B_ptr, C_ptr, documents_ptr, scores_ptr,
    length, groups, chunks, B_b, B_l: tl.constexpr, B_g, B_n, C_b, C_l: tl.constexpr, C_g, C_n,
    DTYPE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write C B^T of a chunk and group (B, c, G, Q, Q): the token that reads in rows, zero where it must not."""
    program = tl.program_id(0).to(tl.int64)
    group, chunk, b = program % groups, program // groups % chunks, program // groups // chunks
    rows, columns = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    first, left = chunk * Q, (length - chunk * Q).to(tl.int32)
    B_qn = load_tile(B_ptr + b * B_b + first * B_l + group * B_g, columns, n, B_l, B_n, left, N).to(DTYPE)
    C_qn = load_tile(C_ptr + b * C_b + first * C_l + group * C_g, rows, n, C_l, C_n, left, N).to(DTYPE)
    allowed = rows[:, None] >= columns[None, :]
    if HAS_DOCUMENTS:
        documents = documents_ptr + b * length + first
        here = tl.load(documents + rows, mask=rows < left, other=-1)
        there = tl.load(documents + columns, mask=columns < left, other=-1)
        allowed = allowed & (here[:, None] == there[None, :])
    scores = tl.where(allowed, product(C_qn, tl.trans(B_qn), None, PRECISION), 0.0)
    out = scores_ptr + program * (Q * Q) + rows[:, None] * Q + columns[None, :]
    tl.store(out, scores.to(scores_ptr.dtype.element_ty))


@triton.jit
def outputs_kernel(
    x_ptr, C_ptr, D_ptr, z_ptr, scores_ptr, decays_ptr, states_ptr, y_ptr,
    length, heads, per_group, chunks, splits, heads_each,
    x_b, x_l: tl.constexpr, x_h, x_p, C_b, C_l: tl.constexpr, C_g, C_n, z_b, z_l, z_h, z_p, D_h, D_p: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y of R tokens of a chunk for some heads of a group: from the state before, and from the chunk's tokens."""
    part, chunk, b, group, begin, end = place(heads, per_group, chunks, splits, heads_each, Q // R)
    rows, p, n = tl.arange(0, R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first = chunk.to(tl.int64) * Q
    mine = first + part * R
    left = length - chunk * Q - part * R
    if left <= 0:
        return
    dtype = y_ptr.dtype.element_ty
    C_rn = load_tile(C_ptr + b * C_b + mine * C_l + group * C_g, rows, n, C_l, C_n, left, N).to(dtype)
    square = scores_ptr + ((b * chunks + chunk) * (heads // per_group) + group) * (Q * Q) + part * R * Q
    square += rows[:, None] * Q + rows[None, :]
    for head in tl.range(begin, end, disable_licm=True):
        h = tl.cast(head, tl.int64)
        decays = decays_ptr + ((b * heads + h) * chunks + chunk) * (PLANES * Q) + rows
        total = tl.load(decays + TOTAL * Q + part * R)
        states = states_ptr + ((b * chunks + chunk) * heads + h) * (P * N)
        y = product(C_rn, load_tile(states, n, p, 1, N, N, P), None, PRECISION)
        y *= tl.load(decays + FROM_START * Q + part * R)[:, None]
        inputs = x_ptr + b * x_b + h * x_h
        x = load_tile(inputs + mine * x_l, rows, p, x_l, x_p, left, P)
        weights = bounded_exp2(total[:, None] - tl.load(decays + ORIGIN * Q + part * R)[None, :])
        weights *= tl.load(square + part * R)
        y = product(weights.to(dtype), x, y, PRECISION)
        if HAS_D:
            y += weight_of_input(D_ptr + h * D_h, p, D_p, P) * x.to(tl.float32)
        if Q > R:
            if part > 0:  # the second half of a chunk reads the first
                x = load_tile(inputs + first * x_l, rows, p, x_l, x_p, R, P)
                weights = bounded_exp2(total[:, None] - tl.load(decays + ORIGIN * Q)[None, :]) * tl.load(square)
                y = product(weights.to(dtype), x, y, PRECISION)
        if HAS_Z:
            z = load_tile(z_ptr + b * z_b + mine * z_l + h * z_h, rows, p, z_l, z_p, left, P).to(tl.float32)
            y *= z * tl.sigmoid(z)
        out = y_ptr + ((b * length + mine) * heads + h) * P + rows[:, None] * (heads * P) + p[None, :]
        tl.store(out, y.to(dtype), mask=(rows[:, None] < left) & (p[None, :] < P))


def decays(
    shape: Shape, dt: Tensor, A: Tensor, dt_bias: Tensor | None, documents: Tensor | None, softplus: bool,
    limit: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Return every token's step size and decays, (B, H, c, 5, Q) in float32, in the order of the planes above."""
    return _decays(shape, dt, A, dt_bias, documents, softplus, limit, brief=False)


def totals(
    shape: Shape, dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """Return TOTAL and ORIGIN alone, (B, H, c, 2, Q), from which the others follow where there is one document."""
    return _decays(shape, dt, A, dt_bias, None, softplus, limit, brief=True)


def _decays(
    shape: Shape, dt: Tensor, A: Tensor, dt_bias: Tensor | None, documents: Tensor | None, softplus: bool,
    limit: tuple[float, float], brief: bool,
) -> Tensor:  # fmt: skip
    planes = 2 if brief else PLANES.value
    out = dt.new_empty(shape.batch, shape.heads, shape.chunks, planes, shape.chunk, dtype=torch.float32)
    options = shape.launch("decays", dt)
    grid = (shape.batch * shape.chunks, triton.cdiv(shape.heads, options["BLOCK_H"]))
    decays_kernel[grid](
        dt, A, dt_bias, documents, out, shape.length, shape.heads, shape.chunks, *limit, *dt.stride(),
        SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, HAS_DOCUMENTS=documents is not None, BRIEF=brief,
        Q=shape.chunk, **options,
    )  # fmt: skip
    return out


def carry(shape: Shape, values: Tensor, maps: Tensor, decays: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the states before every chunk (B, c, H, P, N), and after the last in float32 (B, H, P, N)."""
    states, end, _ = _carry(shape, values, maps, decays, start, None)
    return states, end


def carry_back(
    shape: Shape, dy: Tensor, C: Tensor, decays: Tensor, start: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the states after every chunk, and before the first, as `carry` does for states.

    Last comes the gradient of every chunk's whole log decay through the state before it (B, H, c, blocks of a state).
    """
    return _carry(shape, dy, C, decays, start, before)


def _carry(
    shape: Shape, values: Tensor, maps: Tensor, decays: Tensor, start: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    cells = (shape.heads, shape.width, shape.size)
    states = values.new_empty(shape.batch, shape.chunks, *cells)
    end = values.new_empty(shape.batch, *cells, dtype=torch.float32)
    options = shape.launch("carry", values)
    blocks = {
        "BLOCK_P": min(options["BLOCK_P"], block(shape.width)),
        "BLOCK_N": min(options["BLOCK_N"], block(shape.size)),
    }
    constants = {**shape.constants, **options, **blocks}
    parts = triton.cdiv(shape.width, blocks["BLOCK_P"]) * triton.cdiv(shape.size, blocks["BLOCK_N"])
    passed = decays.new_empty(shape.batch, shape.heads, shape.chunks, parts)
    carry_kernel[(shape.batch * shape.heads * parts,)](
        values, maps, decays, start, states, end, before, passed, shape.length, shape.heads,
        shape.heads // shape.groups, shape.chunks, *values.stride(), *maps.stride(), REVERSE=before is not None,
        HAS_START=start is not None, **constants,
    )  # fmt: skip
    return states, end, passed


def scores(shape: Shape, B: Tensor, C: Tensor, documents: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return C B^T inside chunks (B, c, G, Q, Q), the token that reads in rows, zero where it must not."""
    # The range of float16 may not hold a product of float16 factors.
    kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
    out = B.new_empty(shape.batch, shape.chunks, shape.groups, shape.chunk, shape.chunk, dtype=kept)
    options = shape.launch("scores", out)
    options["BLOCK_Q"] = min(options["BLOCK_Q"], shape.chunk)
    scores_kernel[(shape.batch * shape.chunks * shape.groups, shape.chunk // options["BLOCK_Q"])](
        B, C, documents, out, shape.length, shape.groups, shape.chunks, *B.stride(), *C.stride(),
        DTYPE=getattr(tl, str(dtype).split(".")[1]), HAS_DOCUMENTS=documents is not None, N=shape.size, Q=shape.chunk,
        BLOCK_N=block(shape.size), PRECISION=shape.precision, **options,
    )  # fmt: skip
    return out


def outputs(
    shape: Shape, x: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, scores: Tensor, decays: Tensor,
    states: Tensor,
) -> Tensor:  # fmt: skip
    """Return y (B, L, H, P)."""
    y = x.new_empty(x.shape)
    options = shape.launch("outputs", x)
    heads_each, splits = shape.split(options.pop("HEADS"), x.device)
    outputs_kernel[(shape.programs(splits),)](
        x, C, D, z, scores, decays, states, y, shape.length, shape.heads, shape.heads // shape.groups, shape.chunks,
        splits, heads_each, *x.stride(), *C.stride(), *(x if z is None else z).stride(),
        *((0, 0) if D is None else D.stride()), HAS_D=D is not None, HAS_Z=z is not None, R=shape.part,
        **shape.constants, **options,
    )  # fmt: skip
    return y
