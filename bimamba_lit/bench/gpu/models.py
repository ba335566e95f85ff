"""Cases of whole models at the paper's sizes: a training step of the blocks, and decoding.

Legend: B batch, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import MambaLM
from bimamba_lit.bench.gpu import shapes
from bimamba_lit.bench.gpu.case import Call, Case, Chosen, Inputs, Work
from bimamba_lit.bench.gpu.ops import OURS
from bimamba_lit.bench.gpu.peer_models import PeerBlocks, on_the_fly_
from bimamba_lit.bench.gpu.peers import mamba_ssm
from bimamba_lit.bench.gpu.shapes import Model, randn
from bimamba_lit.binarize import FBI, binarize_, pack_


def model_cases(chosen: Chosen, layers: int) -> Iterator[Case]:
    """Yield the chosen cases.

    Args:
        chosen: Says which.
        layers: Blocks of a training step's model, at most; decoding has all.
    """
    for model in shapes.MODELS:
        if chosen("training"):
            yield from _training(model, min(layers, model.n_layer))
        if chosen("decode"):
            yield from _decoding(model)


def _training(model: Model, layers: int) -> Iterator[Case]:
    """Yield cases of the blocks' forward and backward pass, every gradient, in bf16-mixed precision: binary, dense."""

    def inputs() -> Inputs:
        return {
            "x": randn(shapes.BATCH, shapes.LENGTH, model.d_model, dtype=torch.float32, grad=True),
            "direction": randn(shapes.BATCH, shapes.LENGTH, model.d_model, dtype=torch.float32),
        }

    def step(build: Callable[[], nn.Module]) -> Call:
        built = cache(build)
        return lambda given: _with_gradients(built(), given, mixed=True)

    def ours(binary: bool) -> nn.Sequential:
        blocks = nn.Sequential(*_seeded(model, layers).backbone.layers)
        return binarize_(blocks, FBI) if binary else blocks

    def theirs(binary: bool) -> PeerBlocks:
        blocks = PeerBlocks(model.d_model, layers).take_over(ours(False))
        return on_the_fly_(blocks) if binary else blocks

    products = Work(0, 6 * shapes.TOKENS * sum(i * o for i, o in model.projections))
    forward, backward = model.scan()
    work = Work(0, layers * (products.flops + forward.flops + backward.flops))
    for name, binary in (("FBI", True), ("dense", False)):
        build = partial(ours, binary)
        calls = {OURS: step(build)}
        if mamba_ssm("modules.mamba2") is not None:
            calls["mamba_ssm, formed on the fly" if binary else "mamba_ssm"] = step(partial(theirs, binary))
        yield Case(
            "training",
            f"{name} blocks, forward + backward",
            f"{model.name}: {layers} of {model.n_layer} layers, {shapes.BATCH} x {shapes.LENGTH}",
            inputs,
            calls,
            work,
            right=partial(_right_step, build),
            rotate=False,
        )


def _right_step(build: Callable[[], nn.Module], given: Inputs) -> list[Tensor]:
    return _with_gradients(build(), given, mixed=False)


def _with_gradients(blocks: nn.Module, given: Inputs, mixed: bool) -> list[Tensor]:
    """Return the blocks' output and the gradient of their input; those of the parameters are computed too."""
    with torch.autocast(shapes.DEVICE, torch.bfloat16, enabled=mixed):
        y = blocks(given["x"])
    leaves = [given["x"], *blocks.parameters()]
    return [y, torch.autograd.grad(y, leaves, given["direction"].to(y.dtype))[0]]


def _seeded(model: Model, layers: int | None = None) -> MambaLM:
    """Return the model or its first layers with the same weights every time."""
    torch.manual_seed(0)
    with torch.device(shapes.DEVICE):
        return MambaLM(model.config(layers))


def _decoding(model: Model) -> Iterator[Case]:
    """Yield cases of one token, batch 1, one of each maker, so that each one's memory can be told."""
    weights = model.n_layer * sum(i * o for i, o in model.projections)
    rest = 2 * shapes.VOCABULARY * model.d_model + 2 * model.n_layer * model.heads * shapes.HEAD * shapes.STATE * 4

    def ours(packed: bool) -> Call:
        @cache
        def built() -> tuple[MambaLM, list[Any]]:
            lm = _seeded(model).eval()
            if packed:
                pack_(binarize_(lm, FBI))
            lm.to(torch.bfloat16)
            return lm, [lm.init_state(1)]

        def run(given: Inputs) -> Tensor:
            lm, held = built()
            logits, state = lm.step(given["token"], held[0])
            _write_back(held[0], state)
            return logits

        return run

    def theirs() -> PeerBlocks:
        peer = PeerBlocks(model.d_model, model.n_layer, shapes.VOCABULARY).bfloat16().eval()
        return peer.take_over_all(_seeded(model))

    @torch.no_grad()
    def right(binary: bool, given: Inputs) -> Tensor:
        lm = _seeded(model).eval()
        if binary:
            binarize_(lm, FBI)
        return lm.step(given["token"], lm.init_state(1))[0]

    makers: list[tuple[str, float, Call, bool]] = [
        (f"{OURS}, packed FBI", weights / 8 + rest, ours(True), True),
        (f"{OURS}, bf16", 2 * weights + rest, ours(False), False),
    ]
    if mamba_ssm("modules.mamba2") is not None:
        built = cache(theirs)
        makers.append(("mamba_ssm, bf16", 2 * weights + rest, lambda given: built().step(given["token"]), False))
    while makers:
        by, moved, call, binary = makers.pop(0)  # the model before is let go
        yield Case(
            "decode",
            "1 token",
            f"{model.name}, batch 1",
            lambda: {"token": torch.tensor([17], device=shapes.DEVICE)},
            {by: call},
            Work(moved),
            partial(right, binary),
            rotate=False,
            resident=True,
        )


def _write_back(held: Any, new: Any) -> None:
    """Copy a new state into the tensors of the one held, where a step did not overwrite it."""
    for before, after in zip(held.layers, new.layers, strict=True):
        for old, tensor in zip(before, after, strict=True):
            if old.data_ptr() != tensor.data_ptr():
                old.copy_(tensor)
