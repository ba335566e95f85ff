"""Cases of whole models at the paper's sizes: a training step of the blocks, and decoding.

Legend: B batch, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import cache
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
            yield _training(model, min(layers, model.n_layer))
        if chosen("decode"):
            yield from _decoding(model)


def _training(model: Model, layers: int) -> Case:
    """Return a case of the blocks' forward and backward pass, every gradient, in bf16-mixed precision."""

    def inputs() -> Inputs:
        return {
            "x": randn(shapes.BATCH, shapes.LENGTH, model.d_model),
            "direction": randn(shapes.BATCH, shapes.LENGTH, model.d_model),
        }

    def step(build: Callable[[], nn.Module]) -> Call:
        built = cache(build)

        def run(given: Inputs) -> list[Tensor]:
            blocks = built()
            with torch.autocast(shapes.DEVICE, torch.bfloat16):
                y = blocks(given["x"])
            return list(torch.autograd.grad(y, list(blocks.parameters()), given["direction"].to(y.dtype)))

        return run

    def ours(binary: bool) -> nn.Module:
        with torch.device(shapes.DEVICE):
            blocks = nn.Sequential(*MambaLM(model.config(layers)).backbone.layers)
        return binarize_(blocks, FBI) if binary else blocks

    calls = {f"{OURS}, FBI": step(lambda: ours(True)), f"{OURS}, dense": step(lambda: ours(False))}
    if mamba_ssm("modules.mamba2") is not None:
        calls["mamba_ssm, FBI formed on the fly"] = step(lambda: on_the_fly_(PeerBlocks(model.d_model, layers)))
        calls["mamba_ssm, dense"] = step(lambda: PeerBlocks(model.d_model, layers))
    products = Work(0, 6 * shapes.TOKENS * sum(i * o for i, o in model.projections))
    forward, backward = model.scan()
    flops = layers * (products.flops + forward.flops + backward.flops)
    shape = f"{model.name}: {layers} of {model.n_layer} layers, {shapes.BATCH} x {shapes.LENGTH}"
    return Case(
        "training",
        "blocks, forward + backward",
        shape,
        inputs,
        calls,
        Work(0, flops),
        rotate=False,
    )


def _decoding(model: Model) -> Iterator[Case]:
    """Yield cases of one token, batch 1, one of each maker, so that each one's memory can be told."""
    weights = model.n_layer * sum(i * o for i, o in model.projections)
    rest = 2 * shapes.VOCABULARY * model.d_model + 2 * model.n_layer * model.heads * shapes.HEAD * shapes.STATE * 4

    def ours(packed: bool) -> Call:
        @cache
        def built() -> tuple[MambaLM, list[Any]]:
            with torch.device(shapes.DEVICE):
                lm = MambaLM(model.config()).eval()
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

    makers: list[tuple[str, float, Call]] = [
        (f"{OURS}, packed FBI", weights / 8 + rest, ours(True)),
        (f"{OURS}, bf16", 2 * weights + rest, ours(False)),
    ]
    if mamba_ssm("modules.mamba2") is not None:
        built = cache(lambda: PeerBlocks(model.d_model, model.n_layer, shapes.VOCABULARY).bfloat16().eval())
        makers.append(("mamba_ssm, bf16", 2 * weights + rest, lambda given: built().step(given["token"])))
    while makers:
        by, moved, call = makers.pop(0)  # the model before is let go
        yield Case(
            "decode",
            "1 token",
            f"{model.name}, batch 1",
            lambda: {"token": torch.tensor([17], device=shapes.DEVICE)},
            {by: call},
            Work(moved),
            rotate=False,
            resident=True,
        )


def _write_back(held: Any, new: Any) -> None:
    """Copy a new state into the tensors of the one held, where a step did not overwrite it."""
    for before, after in zip(held.layers, new.layers, strict=True):
        for old, tensor in zip(before, after, strict=True):
            if old.data_ptr() != tensor.data_ptr():
                old.copy_(tensor)
