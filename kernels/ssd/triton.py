"""SSD in Triton as `torch.library` ops: what runs on a GPU.

The kernels are in `triton_forward` and `triton_backward`. Nothing but the inputs is kept for the backward pass.
Products take factors of the inputs' dtype; decays, states while they are carried, and all sums are float32. Every sum
has a fixed order, so repeated runs are equal bit for bit, with or without ``torch.use_deterministic_algorithms``.

The gradient of A is one number a head, a sum that may cancel by chance, and then tells every rounding of a factor. In
half precision the backward pass therefore never rounds C B^T. What a gate gives back is of the inputs' dtype, as with
a gate that is an op of its own, and is the largest error of A's gradient where there is a gate.

Legend: B batch, L length, H heads, P head width, G groups, N state size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d.naive import document_numbers
from bimamba_lit.kernels.configurations import TABLE, CompileCase, architecture
from bimamba_lit.kernels.ssd import parallel, triton_backward, triton_forward
from bimamba_lit.kernels.ssd.triton_backward import Destinations
from bimamba_lit.kernels.ssd.triton_forward import Shape, block, readable
from bimamba_lit.kernels.ssd.triton_step import compile_step
from bimamba_lit.kernels.ssd.triton_step import ssd_step as ssd_step
from bimamba_lit.kernels.ssd.triton_walk import walk
from bimamba_lit.kernels.sums import sum_parts

DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
WIDEST = 128  # head that a program takes


def _largest_state(dtype: torch.dtype, device: torch.device) -> int:
    """Return head width times state size, each rounded up to a power of two, up to which the table has a chunk."""
    rows = TABLE["ssd/chunk"]
    name = architecture(device)
    return max(
        (
            row.up_to or 0
            for row in rows
            if row.itemsize in (None, dtype.itemsize) and (not row.architectures or name in row.architectures)
        ),
        default=0,
    )


# As torch.compiler.assume_constant_result does: the table is not traced.
_largest_state._dynamo_marked_constant = True  # type: ignore[attr-defined]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `naive.ssd` computes; `chunk_size` plays no part: the table of configurations has the chunk.

    Inputs in float64, and states of one head that are too large for a program's registers, take the `parallel` form.
    """
    if not fits(x, x.shape[-1], B.shape[-1]):
        return parallel.ssd(
            x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx,
            return_final_states,
        )  # fmt: skip
    documents = None if seq_idx is None else document_numbers(seq_idx).to(torch.int32)
    y, states = torch.ops.bimamba.ssd(
        x, dt, A, B, C, D, z, dt_bias, initial_states, documents, dt_softplus, *map(float, dt_limit)
    )
    return (y, states) if return_final_states else y


def fits(x: Tensor, width: int, size: int) -> bool:
    """Say whether the kernels take inputs of x's dtype and device, heads P and states N as wide as this."""
    width, size = block(width), block(size)
    return x.dtype != torch.float64 and width <= WIDEST and width * size <= _largest_state(x.dtype, x.device)


class Call(NamedTuple):
    """The arguments of a call as the kernels take them: small vectors in float32, documents numbered in int32."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    documents: Tensor | None
    dt_softplus: bool
    limit: tuple[float, float]

    @classmethod
    def of(
        cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, initial_states: Tensor | None, documents: Tensor | None, dt_softplus: bool, low: float,
        high: float,
    ) -> "Call":  # fmt: skip
        """Convert and copy only what kernels cannot read as it is."""
        return cls(
            readable(x), readable(dt), A.float().contiguous(), readable(B), readable(C),
            None if D is None else D.float().reshape(x.shape[2], -1).expand(x.shape[2:]),
            None if z is None else readable(z),
            None if dt_bias is None else dt_bias.float().contiguous(),
            None if initial_states is None else initial_states.contiguous(),
            None if documents is None else documents.contiguous(),
            dt_softplus, (low, high),
        )  # fmt: skip


class Prepared(NamedTuple):
    """What both passes start from: decays, and the states before every chunk and after the last."""

    decays: Tensor
    before: Tensor
    last: Tensor

    @classmethod
    def of(cls, shape: Shape, call: Call) -> "Prepared":
        """Launch what makes it."""
        decays = _decays(shape, call)
        before, last = triton_forward.carry(shape, call.x, call.B, decays, call.initial_states)
        return cls(decays, before, last)


def _decays(shape: Shape, call: Call) -> Tensor:
    return triton_forward.decays(shape, call.dt, call.A, call.dt_bias, call.documents, call.dt_softplus, call.limit)


def _scores(shape: Shape, call: Call) -> Tensor:
    return triton_forward.scores(shape, call.B, call.C, call.documents, call.x.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) and the final states (B, H, P, N) in float32."""
    shape = Shape.of(call.x, call.B)
    if call.z is None and (walked := shape.walked(call.x)):
        documents, scores = call.documents is not None, _scores(walked, call)
        if documents:
            decays = _decays(walked, call)
        else:
            decays = triton_forward.totals(walked, call.dt, call.A, call.dt_bias, call.dt_softplus, call.limit)
        return walk(walked, call.x, call.B, call.C, call.D, scores, decays, documents, call.initial_states)
    decays, before, last = Prepared.of(shape, call)
    y = triton_forward.outputs(shape, call.x, call.C, call.D, call.z, _scores(shape, call), decays, before)
    return y, last


def backward(dy: Tensor, dlast: Tensor | None, call: Call, to: Destinations) -> dict[str, Tensor]:
    """Return the gradients by name, in float32 or the input's dtype, of the tensors that were given."""
    shape = Shape.of(call.x, call.B)
    x, B, C, D, z, documents = call.x, call.B, call.C, call.D, call.z, call.documents
    dy = readable(dy)
    decays, before, _ = Prepared.of(shape, call)
    found = to._asdict()
    if z is not None:
        y = triton_forward.outputs(shape, x, C, D, None, _scores(shape, call), decays, before)
        dy, found["z"] = triton_backward.gate_gradients(shape, dy, z, y)
    after, first, passed = triton_forward.carry_back(shape, dy, C, decays, dlast, before)
    if call.initial_states is not None:
        found["initial_states"] = first
    inputs = triton_backward.input_gradients(shape, x, dy, B, C, D, documents, decays, after, to.x)
    if inputs.dD is not None:
        found["D"] = sum_parts(inputs.dD)
    dscores = triton_backward.score_gradients(shape, x, dy, decays)
    lasting = triton_backward.gradient_of_B(shape, x, B, C, documents, decays, after, dscores, to.B)
    read = triton_backward.gradient_of_C(shape, dy, B, C, documents, decays, before, dscores, to.C)
    found["A"], dbias = triton_backward.decay_gradients(
        shape, call.dt, call.A, call.dt_bias, call.dt_softplus, call.limit, decays, inputs, lasting, read, passed, to.dt
    )
    if dbias is not None:
        found["dt_bias"] = dbias
    return found


@torch.library.custom_op("bimamba::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, documents: Tensor | None, dt_softplus: bool, low: float,
    high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(Call.of(x, dt, A, B, C, D, z, dt_bias, initial_states, documents, dt_softplus, low, high))


@_ssd.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, B.shape[-1], dtype=torch.float32)


@torch.library.custom_op("bimamba::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_states: Tensor | None, documents: Tensor | None,
    dt_softplus: bool, low: float, high: float,
) -> list[Tensor]:  # fmt: skip
    call = Call.of(x, dt, A, B, C, D, z, dt_bias, initial_states, documents, dt_softplus, low, high)
    dlast = None if dlast is None else dlast.contiguous()
    found = backward(dy, dlast, call, Destinations.of_their_own(x, dt, B, C))
    if D is not None and D.ndim == 1:
        found["D"] = found["D"].sum(1)
    given = _given(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return [found[name].to(t.dtype) for name, t in given.items()]


@_ssd_backward.register_fake
def _(dy: Tensor, dlast: Tensor | None, *inputs: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _given(*inputs[: len(DIFFERENTIABLE)]).values()]


def _given(*tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in zip(DIFFERENTIABLE, tensors, strict=True) if t is not None}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = len(DIFFERENTIABLE) + 1
    ctx.save_for_backward(*inputs[:tensors])
    ctx.options = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    found = iter(torch.ops.bimamba.ssd_backward(dy, dlast, *inputs, *ctx.options))
    given = [None if t is None else next(found) for t in inputs[: len(DIFFERENTIABLE)]]
    return *given, None, *(None for _ in ctx.options)


_ssd.register_autograd(_gradients, setup_context=_setup_context)


def compile_cases() -> list[CompileCase]:
    """Return launches of each shape class and with each option."""

    def case(
        name: str, dtype: torch.dtype, width: int, size: int, groups: int = 1, optional: bool = False
    ) -> CompileCase:
        def call() -> object:
            def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(*shape, dtype=dtype, device="meta")

            batch, length, heads = 8, 2048, 48
            vector, state = empty(heads, dtype=torch.float32), empty(batch, heads, width, size, dtype=torch.float32)
            # x, B and C are parts of one projection, as in the model.
            inner, maps = heads * width, groups * size
            whole = empty(batch, length, inner + 2 * maps)
            x, B, C = (
                t.unflatten(-1, sizes)
                for t, sizes in zip(
                    whole.split([inner, maps, maps], dim=-1),
                    ((heads, width), (groups, size), (groups, size)),
                    strict=True,
                )
            )
            given = Call.of(
                x, empty(batch, length, heads, dtype=torch.float32), vector, B, C, vector,
                empty(batch, length, heads, width) if optional else None, vector, state if optional else None,
                empty(batch, length, dtype=torch.int32) if optional else None, True, 0.0, math.inf,
            )  # fmt: skip
            dy = empty(batch, length, heads, width)
            to = Destinations.of_their_own(given.x, given.dt, given.B, given.C)
            return forward(given), backward(dy, state if optional else None, given, to)

        return CompileCase(name, call)

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        case("bf16", bf16, 64, 128),
        case("bf16 with all options", bf16, 64, 128, groups=2, optional=True),
        case("fp16 wide", torch.float16, 128, 256, optional=True),
        case("bf16 odd", bf16, 40, 24, groups=3),
        case("fp32", fp32, 64, 128, optional=True),
        CompileCase("step", lambda: compile_step(1)),
        CompileCase("step of many", lambda: compile_step(8)),
    ]
