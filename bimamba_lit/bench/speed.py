"""Time of training, forward pass and decoding on a CPU, each beside transformers' in the same run where installed."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.bench.models import MIXERS
from bimamba_lit.binarize import FBI, binarize_

WIDTH, LAYERS, VOCABULARY, BATCH, LENGTH, HEAD, STATE = 512, 4, 1024, 2, 512, 64, 128
SHAPE = f"d_model {WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY}, batch {BATCH} x {LENGTH}"
REPEATS = 5
DECODED = 20  # tokens in a row, as a text is generated
QUANTITIES = (
    "training step, fp32",
    "training step, bf16-mixed",
    "forward, fp32",
    "forward, bf16-mixed",
    "decode one token, fp32",
)


@dataclass(frozen=True)
class Row:
    """Median milliseconds of one call.

    Attributes:
        name: What was timed.
        dense: This project's full-precision model.
        binary: This project's model with FBI projections.
        peer: transformers' model, or None where it is not installed.
    """

    name: str
    dense: float
    binary: float
    peer: float | None


def speed() -> Iterator[Row]:
    """Yield a row for each mixer and quantity; the models take turns, after a warm-up each."""
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    for mixer, title in MIXERS.items():
        config = MambaConfig(d_model=WIDTH, n_layer=LAYERS, vocab_size=VOCABULARY, mixer=mixer)
        models: list[nn.Module] = [MambaLM(config), binarize_(MambaLM(config), FBI)]
        if (peer := _transformers(mixer)) is not None:
            models.append(peer)
        for quantity in QUANTITIES:
            calls = [_call(quantity, model, ids) for model in models]
            times = _times(calls, REPEATS)
            if quantity.startswith("decode"):
                times = [each / DECODED for each in times]
            yield Row(f"{title}, {quantity}", times[0], times[1], times[2] if peer is not None else None)


def _call(quantity: str, model: nn.Module, ids: Tensor) -> Callable[[], object]:
    if quantity.startswith("decode"):
        return _decoder(model, ids[:1, :1])
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled="bf16" in quantity)
    step = _train if quantity.startswith("training") else _forward
    return partial(step, model.train() if step is _train else model.eval(), ids, autocast)


def _train(model: nn.Module, ids: Tensor, autocast: Callable[[], Any]) -> None:
    model.zero_grad()
    with autocast():
        if isinstance(model, MambaLM):
            hidden = model.backbone(ids[:, :-1])
            loss = ops.distillation_loss(hidden, model.head_weight, labels=ids[:, 1:], hard_share=1.0)
        else:
            loss = model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
    loss.backward()


@torch.no_grad()
def _forward(model: nn.Module, ids: Tensor, autocast: Callable[[], Any]) -> None:
    with autocast():
        model(ids[:, :-1]) if isinstance(model, MambaLM) else model(ids[:, :-1], use_cache=False)


def _decoder(model: nn.Module, token: Tensor) -> Callable[[], object]:
    model.eval()
    if isinstance(model, MambaLM):
        state = model.init_state(1)
        return lambda: [model.step(token[:, 0], state) for _ in range(DECODED)]
    with torch.no_grad():
        found = model(token.expand(1, 8), use_cache=True)
    name = "cache" if "cache" in found else "cache_params"  # up to transformers 5.23
    cache = {name: found[name]}

    @torch.no_grad()
    def decode() -> None:
        for _ in range(DECODED):
            model(token, **cache, use_cache=True)

    return decode


def _transformers(mixer: str) -> nn.Module | None:
    if find_spec("transformers") is None or (mixer == "mamba" and find_spec("mambapy") is None):
        return None
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mixer == "mamba":
            # Its fastest form on a CPU; without mambapy a training step takes more than a minute.
            return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=True))
        heads: dict[str, Any] = {"head_dim": HEAD, "state_size": STATE, "n_groups": 1, "num_heads": 2 * WIDTH // HEAD}
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads))


def _times(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in seconds]
