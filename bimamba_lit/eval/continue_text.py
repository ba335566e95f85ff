"""Continuing a text with a saved model and the tokenizer saved beside it."""

from pathlib import Path

import torch

from bimamba_lit.errors import UserError
from bimamba_lit.eval.reader import load_reader
from bimamba_lit.models.deployed import deployed_
from bimamba_lit.models.generate import generate

_LEAST_SEED, _LARGEST_SEED = -(1 << 63), (1 << 64) - 1  # that torch takes


def continue_text(path: str | Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Return ``prompt`` and what the model makes of it, on a GPU where there is one.

    There, binary layers are packed and what stays in full precision is held in bfloat16.

    Args:
        path: A run folder, a checkpoint or a saved model's folder, with its tokenizer.
        prompt: The text to continue, not empty.
        max_new_tokens: Tokens to add.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Of the random draws.

    Raises:
        UserError: If the model or its tokenizer is missing, or an argument is out of range.
    """
    if not _LEAST_SEED <= seed <= _LARGEST_SEED:
        raise UserError(f"seed: {seed} is out of range, it must be {_LEAST_SEED} to {_LARGEST_SEED}")
    lm, tokenizer = load_reader(path)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty: give at least one character to continue")
    if torch.cuda.is_available():
        lm = deployed_(lm).to("cuda")
    generator = torch.Generator(lm.device).manual_seed(seed)
    out = generate(lm, torch.tensor([ids]), max_new_tokens, temperature, generator)
    return tokenizer.decode(out[0].tolist())
