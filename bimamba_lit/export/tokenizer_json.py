"""Tokenizers as a ``tokenizer.json``, which programs read; the byte tokenizer has none of its own."""

from bimamba_lit.data.bpe import SEPARATOR
from bimamba_lit.data.tokenizer import ByteTokenizer, tokenizer_from_json


def as_tokenizer_json(definition: str) -> str:
    """Return a tokenizer's definition as a ``tokenizer.json``.

    The byte tokenizer becomes a BPE without merges whose ids are the bytes 0 to 255, and 256 between documents.

    Args:
        definition: What the tokenizer's ``to_json`` gave.

    Raises:
        UserError: If it defines no tokenizer.
    """
    if not isinstance(tokenizer_from_json(definition), ByteTokenizer):
        return definition
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SEPARATOR, normalized=False)])
    assert tokenizer.token_to_id(SEPARATOR) == ByteTokenizer.separator
    return str(tokenizer.to_str())


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level BPE: itself where printable (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
