"""A saved model together with the tokenizer that reads text for it."""

from pathlib import Path

from bimamba_lit.data.bpe import PREFIX
from bimamba_lit.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_from_json
from bimamba_lit.distill import find_checkpoint
from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json


def load_reader(path: str | Path, tokenizer: str | None = None) -> tuple[MambaLM, TextTokenizer]:
    """Return a model, in evaluation mode and without gradients, and its tokenizer.

    Args:
        path: A run folder, a checkpoint, a folder that ``MambaLM.from_pretrained`` takes, or ``hub:OWNER/NAME``.
        tokenizer: The tokenizer to use instead of the one saved with the model, as `load_tokenizer` takes it.

    Raises:
        UserError: If the model or the tokenizer is missing or cannot be read, or the tokenizer has ids that the model
            has not.
    """
    if tokenizer is not None and tokenizer.startswith(PREFIX):
        raise UserError(
            f"tokenizer: '{tokenizer}' is trained with a model, and another would not be the same: give bytes, the "
            "path of a tokenizer.json or of a folder with one, or a run"
        )
    checkpoint = find_checkpoint(path)
    if tokenizer is not None:
        chosen: TextTokenizer = load_tokenizer(tokenizer)
    elif (text := load_tokenizer_json(checkpoint)) is not None:
        chosen = tokenizer_from_json(text)
    else:
        load_lm(checkpoint)  # where there is no model either, that is what to say
        raise UserError(
            f"{path} has no tokenizer beside its weights, so there is no way to read text: put its tokenizer.json "
            "there, or (bimamba evaluate) give --tokenizer"
        )
    lm = load_lm(checkpoint).eval().requires_grad_(False)
    if chosen.vocab_size > lm.config.known_vocab_size:
        raise UserError(
            f"the tokenizer has {chosen.vocab_size} tokens and the model {path} knows {lm.config.known_vocab_size}: "
            "give the tokenizer it was trained with"
        )
    return lm, chosen
