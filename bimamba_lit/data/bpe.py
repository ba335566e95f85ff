"""A byte-level BPE trained on the training text, once."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bimamba_lit.data.sources import Part, digest, pieces
from bimamba_lit.data.tokens import unwritable
from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing

PREFIX = "bpe:"
SEPARATOR = "<|endoftext|>"
_LARGEST_TEXT = 100_000_000  # characters; more text changes a vocabulary of usual size little
_FORMAT = 1


def bpe_size(name: str) -> int | None:
    """Return N of the setting ``bpe:N``, the size of the vocabulary, and None for any other setting.

    Raises:
        UserError: If what follows ``bpe:`` is not a number of tokens that a byte-level BPE can have.
    """
    if not name.startswith(PREFIX):
        return None
    size = name.removeprefix(PREFIX)
    if not size.isdecimal() or not 257 < int(size) <= 1 << 20:
        raise UserError(
            f"tokenizer: {name!r} asks for {size or 'no'} tokens; a byte-level BPE has 256 bytes, a separator and at "
            "least one word: write bpe:8192, for instance"
        )
    return int(size)


def trained_bpe(parts: Sequence[Part], document_end: str | None, size: int, cache: Path) -> str:
    """Return a tokenizer.json trained on the first 100 million characters of a text, from the cache or made now.

    The vocabulary holds all 256 bytes, so that every text can be written with it, and one separator. The same text
    gives the same tokenizer.

    Args:
        parts: The text.
        document_end: A line that ends a document within a file.
        size: Tokens of the vocabulary, bytes and separator included.
        cache: Folder of all trained tokenizers.

    Raises:
        UserError: If the text cannot be read or the cache cannot be written.
    """
    from filelock import FileLock

    settings = [_FORMAT, digest(parts), document_end, size]
    folder = cache / f"bpe-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()}"
    file = folder / "tokenizer.json"
    if file.is_file():  # also where nothing may be written
        return file.read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not file.is_file():
                definition = _train(parts, document_end, size)
                with replacing(file) as temporary:
                    temporary.write_text(definition, encoding="utf-8")
            return file.read_text(encoding="utf-8")
    except OSError as error:
        raise unwritable(cache, error) from error


def _train(parts: Sequence[Part], document_end: str | None, size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    print(f"tokenizer: training a BPE of {size} tokens on the training text, once ...", flush=True)
    tokenizer.train_from_iterator(_beginning(parts, document_end), trainer)
    return str(tokenizer.to_str())


def _beginning(parts: Sequence[Part], document_end: str | None) -> Iterator[str]:
    characters = 0
    for piece in pieces(parts, document_end, whole_documents=False):
        yield piece["text"]
        characters += len(piece["text"])
        if characters >= _LARGEST_TEXT:
            return
