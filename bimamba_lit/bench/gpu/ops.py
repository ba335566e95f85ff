"""Cases of the scans, the convolution, the norm, the single-token steps and the distillation loss."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.bench.gpu import shapes
from bimamba_lit.bench.gpu.case import Call, Case, Chosen, Inputs, Work
from bimamba_lit.bench.gpu.peers import installed, mamba_ssm
from bimamba_lit.bench.gpu.shapes import Model, randn, widened

WIDTHS = (1536, 2560)  # of the distillation loss
CHANNELS = 3072  # of the selective scan
OURS, PLAIN = "bimamba-lit", "plain PyTorch"


def op_cases(chosen: Chosen) -> Iterator[Case]:
    """Yield the cases of the chosen ops, one after the other, so that one at a time is in memory."""
    for model in shapes.MODELS:
        if chosen("ssd"):
            yield from _ssd(model)
        if chosen("conv"):
            yield from _conv(model)
        if chosen("norm"):
            yield from _norm(model)
        if chosen("steps"):
            yield from _steps(model)
    if chosen("selective_scan"):
        for innermost in ("channels", "time"):
            yield from _selective_scan(innermost)
    if chosen("distillation_loss"):
        yield from _distillation_loss()


def both_ways(
    op: str,
    shape: str,
    inputs: Callable[[bool], Inputs],
    forwards: dict[str, Call],
    right: Call,
    forward: Work,
    backward: Work,
    rotate: bool = True,
) -> Iterator[Case]:
    """Yield the forward pass of an op, then forward and backward together, with a gradient of every input.

    Args:
        op: Its name.
        shape: In words.
        inputs: Makes inputs, whether gradients are wanted; ``"direction"`` is the gradient of the output.
        forwards: Calls of the inputs but the direction.
        right: The call in float32.
        forward: Work of the forward pass.
        backward: Work of the backward pass.
        rotate: As in `Case`.
    """
    yield Case(
        op,
        "forward",
        shape,
        partial(inputs, False),
        {by: _without_gradient(call) for by, call in forwards.items()},
        forward,
        _without_gradient(lambda given: right(widened(given))),
        rotate,
    )
    yield Case(
        op,
        "forward + backward",
        shape,
        partial(inputs, True),
        {by: partial(_with_gradients, call) for by, call in forwards.items()},
        forward + backward,
        lambda given: _with_gradients(right, widened(given)),
        rotate,
    )


def _split(given: Inputs) -> Inputs:
    return {name: value for name, value in given.items() if name != "direction"}


def _without_gradient(call: Call) -> Call:
    def run(given: Inputs) -> Any:
        with torch.no_grad():
            return call(_split(given))

    return run


def _with_gradients(call: Call, given: Inputs) -> list[Tensor]:
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    output = call(_split(given))
    return [output, *torch.autograd.grad(output, leaves, given["direction"].to(output.dtype))]


def _ssd(model: Model) -> Iterator[Case]:
    heads = model.heads

    def inputs(grad: bool) -> Inputs:
        return {
            "x": randn(shapes.BATCH, shapes.LENGTH, heads, shapes.HEAD, grad=grad),
            "dt": (randn(shapes.BATCH, shapes.LENGTH, heads).float() - 3).bfloat16().requires_grad_(grad),
            "A": (-15 * torch.rand(heads, device=shapes.DEVICE) - 1).requires_grad_(grad),
            "B": randn(shapes.BATCH, shapes.LENGTH, 1, shapes.STATE, grad=grad),
            "C": randn(shapes.BATCH, shapes.LENGTH, 1, shapes.STATE, grad=grad),
            "D": randn(heads, dtype=torch.float32, grad=grad),
            "dt_bias": randn(heads, dtype=torch.float32, grad=grad),
            "direction": randn(shapes.BATCH, shapes.LENGTH, heads, shapes.HEAD),
        }

    def run(given: Inputs, backend: str) -> Any:
        return ops.ssd(**given, chunk_size=shapes.CHUNK, dt_softplus=True, backend=backend)

    calls: dict[str, Call] = {OURS: partial(run, backend="auto"), PLAIN: partial(run, backend="chunked")}
    if (theirs := mamba_ssm("ops.triton.ssd_combined")) is not None:
        calls["mamba_ssm"] = lambda given: theirs.mamba_chunk_scan_combined(
            **given, chunk_size=shapes.CHUNK, dt_softplus=True
        )
    shape = f"{model.name}: {heads} heads, {shapes.BATCH} x {shapes.LENGTH}"
    yield from both_ways("ssd", shape, inputs, calls, partial(run, backend="chunked"), *model.scan())


def _selective_scan(innermost: str) -> Iterator[Case]:
    """Yield the cases of one layout: this project's projections leave channels innermost, mamba_ssm's leave time."""
    channels, size = CHANNELS, 16

    def inputs(grad: bool) -> Inputs:
        def laid_out(width: int) -> Tensor:
            if innermost == "time":
                return randn(shapes.BATCH, width, shapes.LENGTH)
            return randn(shapes.BATCH, shapes.LENGTH, width).transpose(1, 2)

        wide = partial(laid_out, channels)

        return {
            "u": wide().requires_grad_(grad),
            "delta": (wide() - 3).requires_grad_(grad),
            "A": (-15 * torch.rand(channels, size, device=shapes.DEVICE) - 1).requires_grad_(grad),
            "B": laid_out(size).requires_grad_(grad),
            "C": laid_out(size).requires_grad_(grad),
            "D": randn(channels, dtype=torch.float32, grad=grad),
            "z": wide().requires_grad_(grad),
            "delta_bias": randn(channels, dtype=torch.float32, grad=grad),
            "direction": wide(),
        }

    def run(given: Inputs, backend: str) -> Any:
        return ops.selective_scan(**given, delta_softplus=True, backend=backend)

    calls: dict[str, Call] = {OURS: partial(run, backend="auto")}
    if (theirs := mamba_ssm("ops.selective_scan_interface")) is not None:
        calls["mamba_ssm (CUDA)"] = lambda given: theirs.selective_scan_fn(**given, delta_softplus=True)
    one, maps = shapes.TOKENS * channels * 2, 2 * shapes.TOKENS * size * 2
    yield from both_ways(
        "selective_scan",
        f"{channels} channels, {shapes.BATCH} x {shapes.LENGTH}, {innermost} innermost",
        inputs,
        calls,
        partial(run, backend="chunked"),
        Work(4 * one + maps),
        Work(7 * one + 2 * maps),
    )


def _conv(model: Model) -> Iterator[Case]:
    channels = model.channels

    def inputs(grad: bool) -> Inputs:
        return {
            "x": randn(shapes.BATCH, shapes.LENGTH, channels).transpose(1, 2).requires_grad_(grad),
            "weight": randn(channels, shapes.TAPS, grad=grad),
            "bias": randn(channels, grad=grad),
            "direction": randn(shapes.BATCH, shapes.LENGTH, channels).transpose(1, 2),
        }

    def run(given: Inputs, backend: str) -> Any:
        return ops.causal_conv1d(**given, activation="silu", backend=backend)

    calls: dict[str, Call] = {
        OURS: partial(run, backend="auto"),
        "cuDNN": lambda given: F.silu(
            F.conv1d(given["x"], given["weight"][:, None], given["bias"], padding=shapes.TAPS - 1, groups=channels)[
                ..., : shapes.LENGTH
            ]
        ),
    }
    if (theirs := installed("causal_conv1d")) is not None:
        calls["causal_conv1d (CUDA)"] = lambda given: theirs.causal_conv1d_fn(**given, activation="silu")
    one = shapes.TOKENS * channels * 2
    shape = f"{model.name}: {channels} channels, {shapes.BATCH} x {shapes.LENGTH}"
    yield from both_ways(
        "conv",
        shape,
        inputs,
        calls,
        partial(run, backend="chunked"),
        Work(2 * one),
        Work(3 * one),
    )


def _norm(model: Model) -> Iterator[Case]:
    width = 2 * model.d_model

    def inputs(grad: bool) -> Inputs:
        return {
            "x": randn(shapes.TOKENS, width, grad=grad),
            "weight": randn(width, dtype=torch.float32, grad=grad),
            "z": randn(shapes.TOKENS, width, grad=grad),
            "direction": randn(shapes.TOKENS, width),
        }

    calls: dict[str, Call] = {OURS: lambda given: ops.rms_norm(**given)}
    if (theirs := mamba_ssm("ops.triton.layernorm_gated")) is not None:
        calls["mamba_ssm"] = lambda given: theirs.rmsnorm_fn(
            given["x"], given["weight"], None, given["z"], eps=1e-5, norm_before_gate=False
        )
    one = shapes.TOKENS * width * 2
    yield from both_ways(
        "norm",
        f"{model.name}: gated, {shapes.TOKENS} x {width}",
        inputs,
        calls,
        lambda given: ops.rms_norm(**given, backend="naive"),
        Work(3 * one),
        Work(5 * one),
    )


def _steps(model: Model) -> Iterator[Case]:
    heads, channels = model.heads, model.channels

    def conv(given: Inputs, backend: str) -> Tensor:
        with torch.no_grad():
            return ops.causal_conv1d_step(**given, activation="silu", backend=backend)[0]

    for batch in (1, 64):
        yield _state_step(model, batch, heads)
        taps = {"weight": (channels, shapes.TAPS), "bias": (channels,)}

        def inputs(batch: int = batch, taps: dict[str, tuple[int, ...]] = taps) -> Inputs:
            return {
                "x": randn(batch, channels),
                "conv_state": randn(batch, channels, shapes.TAPS - 1),
                **{name: randn(*shape) for name, shape in taps.items()},
            }

        yield Case(
            "steps",
            "convolution",
            f"{model.name}: {channels} channels, batch {batch}",
            inputs,
            {OURS: partial(conv, backend="auto")},
            Work(2 * channels * (batch * (2 * shapes.TAPS) + shapes.TAPS + 1)),
            lambda given: conv(widened(given), "naive"),
        )


def _state_step(model: Model, batch: int, heads: int) -> Case:
    def inputs() -> Inputs:
        return {
            "state": randn(batch, heads, shapes.HEAD, shapes.STATE, dtype=torch.float32),
            "x": randn(batch, heads, shapes.HEAD),
            "dt": randn(batch, heads),
            "A": -15 * torch.rand(heads, device=shapes.DEVICE) - 1,
            "B": randn(batch, 1, shapes.STATE),
            "C": randn(batch, 1, shapes.STATE),
            "D": randn(heads, dtype=torch.float32),
            "dt_bias": randn(heads, dtype=torch.float32),
        }

    def ours(given: Inputs, backend: str) -> Tensor:
        with torch.no_grad():
            return ops.ssd_step(**given, dt_softplus=True, backend=backend)[0]

    calls: dict[str, Call] = {OURS: partial(ours, backend="auto")}
    if (theirs := mamba_ssm("ops.triton.selective_state_update")) is not None:

        def peer(given: Inputs) -> Any:
            grown = {
                "dt": given["dt"][..., None].expand(-1, -1, shapes.HEAD),
                "A": given["A"][:, None, None].expand(-1, shapes.HEAD, shapes.STATE),
                "D": given["D"][:, None].expand(-1, shapes.HEAD),
                "dt_bias": given["dt_bias"][:, None].expand(-1, shapes.HEAD),
            }
            return theirs.selective_state_update(**(given | grown), dt_softplus=True)

        calls["mamba_ssm"] = peer
    return Case(
        "steps",
        "SSD state",
        f"{model.name}: {heads} heads, batch {batch}",
        inputs,
        calls,
        Work(2 * batch * heads * shapes.HEAD * shapes.STATE * 4),
        lambda given: ours(widened(given), "naive"),
    )


def _distillation_loss() -> Iterator[Case]:
    for width in WIDTHS:
        product = 2 * shapes.TOKENS * shapes.VOCABULARY * width

        def inputs(width: int = width) -> Inputs:
            return {
                "hidden_s": randn(shapes.TOKENS, width, grad=True),
                "head_s": randn(shapes.VOCABULARY, width, scale=0.05, grad=True),
                "hidden_t": randn(shapes.TOKENS, width),
                "head_t": randn(shapes.VOCABULARY, width, scale=0.05),
            }

        def run(given: Inputs, backend: str) -> list[Tensor]:
            loss = ops.distillation_loss(**given, backend=backend)
            return [loss, *torch.autograd.grad(loss, (given["hidden_s"], given["head_s"]))]

        yield Case(
            "distillation_loss",
            "forward + backward",
            f"V {shapes.VOCABULARY}, {shapes.TOKENS} tokens, width {width}",
            inputs,
            {
                OURS: partial(run, backend="auto"),
                PLAIN: partial(run, backend="chunked"),
                "naive": partial(run, backend="naive"),
            },
            Work(0, 4 * product),
            lambda given: run(widened(given), "chunked"),
            rotate=False,
        )
