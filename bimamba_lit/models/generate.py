"""Continuing text token by token, in memory that does not grow with its length."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.models.cuda_graph import StepGraph
from bimamba_lit.models.lm import MambaLM

_PREFILL_TOKENS = 2048
_WORTH_A_GRAPH = 8  # new tokens; recording a step costs about three of them


@torch.no_grad()
def generate(
    lm: MambaLM,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    done: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Continue every sequence by ``max_new_tokens`` tokens drawn from the model.

    Args:
        lm: The model; left in the mode (training or evaluation) it was in.
        ids: Prompts (B, L), int64, of one length and without padding.
        max_new_tokens: How many tokens to add to each.
        temperature: Logits are divided by it; 0 takes the most likely token.
        generator: Source of randomness, on the model's device; the global one when not given.
        done: Called after every token with all that were added (B, n); True ends the texts there.

    Returns:
        Prompts and continuations (B, L + max_new_tokens), or shorter where ``done`` said so; int64.

    Raises:
        UserError: If an argument is out of range, or the model's logits are not finite.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature must be 0 (the most likely token) or a positive number, not {temperature}")
    if ids.dim() != 2:
        raise UserError(f"prompts must have the shape (batch, length), not {tuple(ids.shape)}")
    ids = ids.to(lm.device)
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        return _continue(lm, ids, max_new_tokens, temperature, generator, done)
    finally:
        for module, mode in modes:
            module.training = mode


def _continue(
    lm: MambaLM,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    done: Callable[[Tensor], bool] | None,
) -> Tensor:
    graph = StepGraph(lm, ids.shape[0]) if ids.is_cuda and max_new_tokens >= _WORTH_A_GRAPH else None
    state, hidden = graph.state if graph else lm.init_state(ids.shape[0]), None
    # In pieces, so that a long prompt needs no more memory than a short one.
    for piece in ids.split(_PREFILL_TOKENS, dim=1):
        hidden, state = lm.backbone.prefill(piece, state)
    assert hidden is not None
    logits = lm.logits(hidden[:, -1])
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite, so there is nothing to draw from; its training diverged")
    if graph:
        graph.read(state)
        del state
    out = ids.new_empty(ids.shape[0], ids.shape[1] + max_new_tokens)
    out[:, : ids.shape[1]] = ids
    for position in range(ids.shape[1], out.shape[1]):
        out[:, position] = token = _draw(logits, temperature, generator)
        if done is not None and done(out[:, ids.shape[1] : position + 1]):
            return out[:, : position + 1]
        if position + 1 < out.shape[1]:
            if graph:
                logits = graph.step(token)
            else:
                logits, state = lm.step(token, state)
    return out


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
