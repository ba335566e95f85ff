"""Tokenizers: raw bytes, or a ``tokenizer.json`` of Hugging Face ``tokenizers``.

Both treat text as text. No special token is added, and one that is spelled out in a text (``<|endoftext|>`` in a web
page) is encoded like any other characters: ids outside the text, such as the document separator, are placed by the
data module alone. So every id a text turns into stands for bytes of that text, which is what bits per byte divides by.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.hub import hub_file, hub_name
from bimamba_lit.models.checkpoint import load_tokenizer_json

_FILE = "tokenizer.json"
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
# What follows a letter begins a new token in every tokenizer that splits words; `splits_at_words` asks the one at hand.
_PROBE = ("Some words", "  and\tspaces", "\nlines", "\n\n  12 of", " them, 中文", "\n\u00e9t\u00e9", " end.")


class TextTokenizer(Protocol):
    """What the data module, `generate` and the evaluation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the highest id plus one."""

    @property
    def separator(self) -> int | None:
        """Id placed between two documents, or None when the vocabulary has none."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; separators vanish and broken characters become U+FFFD."""

    def to_json(self) -> str:
        """Return all of the tokenizer as text, for `tokenizer_from_json`."""

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text."""

    def encode_sizes(self, texts: list[str]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return the ids of each text and the UTF-8 bytes each id stands for, which sum to the text's."""

    def splits_at_words(self) -> bool:
        """Tell whether a text cut between a letter and a space or line end has the same tokens as in one piece."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 between documents."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of ``text``."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of byte ids; separators vanish and broken characters become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def to_json(self) -> str:
        """Return the text that `tokenizer_from_json` turns into a `ByteTokenizer`."""
        return json.dumps({"type": "bytes"})

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Return the UTF-8 bytes of each text, int64."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def encode_sizes(self, texts: list[str]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return the UTF-8 bytes of each text, and as many ones."""
        ids = self.encode_batch(texts)
        return ids, [np.ones_like(i) for i in ids]

    def splits_at_words(self) -> bool:
        """Return True: bytes do not depend on their neighbours."""
        return True


class SubwordTokenizer:
    """A Hugging Face ``tokenizers`` tokenizer.

    Args:
        definition: The content of a ``tokenizer.json``. Its truncation, padding and post-processor (which adds special
            tokens) are not used; `to_json` keeps them.

    Raises:
        UserError: If the text does not define a tokenizer.
    """

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer

        # Unset, tokenizers complains on stderr at every fork of a data worker after it has used its threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            fields = json.loads(definition)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the tokenizer is not JSON: {error}") from error
        if not isinstance(fields, dict) or "model" not in fields:
            raise UserError("the tokenizer has no 'model' key, as a tokenizer.json of Hugging Face tokenizers has")
        # The post-processor would also trim spaces off the offsets that `encode_sizes` counts.
        fields.update(truncation=None, padding=None, post_processor=None)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(f"Hugging Face tokenizers does not accept the tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._definition = definition
        vocabulary = self._tokenizer.get_vocab()
        if not vocabulary:
            raise UserError("the tokenizer's vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.separator: int | None = next((vocabulary[name] for name in _SEPARATORS if name in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special tokens vanish and broken characters become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> str:
        """Return the definition the tokenizer was made from."""
        return self._definition

    def tokens(self) -> dict[int, str]:
        """Return every token as the vocabulary spells it, by id."""
        return {i: token for token, i in self._tokenizer.get_vocab().items()}

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text, int64."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_sizes(self, texts: list[str]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return the ids of each text and the UTF-8 bytes each id stands for, both int64.

        A token's bytes are those between the end of the token before it and its own end, so that text which a
        normalizer drops is counted with the token after it (at the end of the text, before it), and a character that
        several tokens share with the first of them.
        """
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return ids, [_sizes(t, [end for _, end in e.offsets]) for t, e in zip(texts, encodings, strict=True)]

    def splits_at_words(self) -> bool:
        """Tell whether a text cut between a letter and a space or line end has the same tokens as in one piece."""
        return self.encode("".join(_PROBE)) == [i for piece in _PROBE for i in self.encode(piece)]


def _sizes(text: str, ends: list[int]) -> NDArray[np.int64]:
    if not ends:
        return np.zeros(0, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    stops = np.maximum.accumulate(np.array(ends))
    stops[-1] = len(text)
    return np.diff(before[stops], prepend=0)


def tokenizer_from_json(text: str) -> ByteTokenizer | SubwordTokenizer:
    """Rebuild a tokenizer from what its ``to_json`` gave.

    Raises:
        UserError: If the text is neither a byte tokenizer's nor a ``tokenizer.json``.
    """
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    return SubwordTokenizer(text)


def load_tokenizer(name: str) -> ByteTokenizer | SubwordTokenizer:
    """Return the tokenizer that a setting names.

    Args:
        name: ``bytes``; the path of a ``tokenizer.json``, of a folder that holds one or of a run of this project; or
            ``hub:OWNER/NAME``, a model on the Hugging Face hub.

    Raises:
        UserError: If the file is missing, unreadable or not a tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    hub = hub_name(name)
    path = Path(name).expanduser() if hub is None else hub_file(hub, _FILE)
    if path.is_dir() and (path / _FILE).is_file():
        path = path / _FILE
    elif (checkpoint := path / "checkpoints" / "last.ckpt").exists():
        if (own := load_tokenizer_json(checkpoint)) is None:
            raise UserError(f"tokenizer: the run {name} holds no tokenizer")
        return tokenizer_from_json(own)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"tokenizer: '{name}' is neither 'bytes' nor 'bpe:SIZE' nor the path of a tokenizer.json file, of a "
            f"folder with one or of a run{nearest(path.name, [*siblings, 'bytes'])}"
        )
    try:
        return SubwordTokenizer(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: cannot read {path} as UTF-8 text: {error}") from error
    except UserError as error:
        raise UserError(f"tokenizer: {path} is not a tokenizer.json: {error}") from error
