"""Time of a training step and of a decoded token on a CPU, beside transformers where it is installed."""

import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.binarize import FBI, binarize_

WIDTH, LAYERS, VOCABULARY, BATCH, LENGTH, HEAD, STATE = 512, 4, 1024, 2, 512, 64, 128
SHAPE = f"Mamba-2, d_model {WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY}, batch {BATCH} x {LENGTH}"
REPEATS = 5


def speed() -> Iterator[tuple[str, float]]:
    """Yield rows of a name and the median milliseconds of one call, each after a warm-up."""
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    config = MambaConfig(d_model=WIDTH, n_layer=LAYERS, vocab_size=VOCABULARY, headdim=HEAD, d_state=STATE)
    dense, binary = MambaLM(config), binarize_(MambaLM(config), FBI)
    models: list[tuple[str, nn.Module, Callable[[], Tensor]]] = [
        ("bimamba-lit", dense, lambda: _loss(dense, ids)),
        ("bimamba-lit, binary (FBI)", binary, lambda: _loss(binary, ids)),
    ]
    peer = _transformers() if find_spec("transformers") else None
    if peer is not None:
        models.append(("transformers", peer, lambda: peer(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss))
    for precision in ("fp32", "bf16-mixed"):
        for name, model, loss in models:
            yield f"training step, {precision}: {name}", _time(lambda: _step(model, loss, precision))  # noqa: B023
    state = dense.init_state(1)
    token = ids[:1, 0]
    yield "decode one token, fp32: bimamba-lit", _time(lambda: dense.step(token, state), REPEATS * 20)


def _loss(lm: MambaLM, ids: Tensor) -> Tensor:
    return ops.distillation_loss(lm.backbone(ids[:, :-1]), lm.head_weight, labels=ids[:, 1:], hard_share=1.0)


def _step(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> None:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        value = loss()
    value.backward()


def _transformers() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = Mamba2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, head_dim=HEAD, state_size=STATE, n_groups=1,
        num_heads=2 * WIDTH // HEAD, tie_word_embeddings=True,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def _time(call: Callable[[], object], repeats: int = REPEATS) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)
