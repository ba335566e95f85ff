"""A tokenizer in a GGUF file: a byte-level BPE that splits text as GPT-2's does, or none."""

import json
from typing import Any

from bimamba_lit.data.tokenizer import SubwordTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.export.tokenizer_json import as_tokenizer_json

# llama.cpp asks for merges, and a byte tokenizer has none: this one joins what no text begins with.
_NEVER = "<|endoftext|> <|endoftext|>"


def add_vocabulary(writer: Any, definition: str | None, vocab_size: int) -> None:
    """Write a tokenizer's tokens, merges and special tokens; without a tokenizer, that there is none.

    Args:
        writer: A ``gguf.GGUFWriter``.
        definition: The tokenizer's JSON, or None.
        vocab_size: Tokens that the model knows; those beyond the tokenizer's are marked as unused.

    Raises:
        UserError: If the tokenizer has more tokens than the model, or is of a kind that is not written.
    """
    import gguf

    writer.add_vocab_size(vocab_size)
    if definition is None:
        writer.add_tokenizer_model("none")
        return
    definition = as_tokenizer_json(definition)
    fields = json.loads(definition)
    _check(fields)
    tokenizer = SubwordTokenizer(definition)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model knows {vocab_size}")
    # Tokens that are looked for before text is split: marks, and runs of spaces in GPT-NeoX's vocabulary.
    added = {
        token["id"]: gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        for token in fields.get("added_tokens", [])
    }
    spelled = tokenizer.tokens()
    tokens = [spelled.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [added.get(i, gguf.TokenType.NORMAL) if i in spelled else gguf.TokenType.UNUSED for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = fields["model"].get("merges", [])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges] or [_NEVER])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if (separator := tokenizer.separator) is not None:
        writer.add_eos_token_id(separator)
        writer.add_bos_token_id(separator)


def _check(fields: dict[str, Any]) -> None:
    model, splitting = fields["model"].get("type"), fields.get("pre_tokenizer") or {}
    if model == "BPE" and splitting.get("type") == "ByteLevel" and not splitting.get("add_prefix_space"):
        return
    raise UserError(
        f"the tokenizer is a {model} split by {splitting.get('type')}, and GGUF files are written with byte-level BPEs "
        "that split as GPT-2's does; export without the tokenizer.json for a file that takes token ids"
    )
