"""Token streams on disk: tokenized once, memory-mapped ever after.

All documents of a text lie in one flat array, separators between them, so that a run holds no text in memory and data
workers share the pages. A stream's folder is named by the SHA-256 of everything that decides its content. Its
description is written last and holds the sizes of the other files: a stream without one, or with a file of another
size, was cut off and is made anew. A lock lets one process make a stream while others that want the same wait for it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bimamba_lit.data.sources import Part, digest, pieces, size_of
from bimamba_lit.data.tokenizer import TextTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing

_FORMAT = 2
_PIECES_AT_ONCE = 16
NOT_A_TARGET = -1


@dataclass(frozen=True)
class TokenStream:
    """A tokenized text.

    Attributes:
        folder: Where the arrays lie.
        dtype: Of the ids, ``uint16`` or ``uint32``.
        length: Ids in the stream, separators included.
        documents: Documents that gave at least one token.
        text_tokens: Ids that stand for text.
        text_bytes: UTF-8 bytes of the text.
        sha256: Of those bytes, the documents in order.
        sized: Whether `sizes` was kept.
    """

    folder: Path
    dtype: str
    length: int
    documents: int
    text_tokens: int
    text_bytes: int
    sha256: str
    sized: bool

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """The ids, (length,), read-only."""
        return self._array("tokens.bin", self.dtype)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where documents begin, (documents,) int64 in rising order; a separator belongs to the document after it."""
        return np.memmap(self.folder / "starts.bin", "int64", "r") if self.documents else np.zeros(0, "int64")

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """UTF-8 bytes of each id, (length,) int32; `NOT_A_TARGET` for separators and each document's first token."""
        return self._array("sizes.bin", "int32")

    def _array(self, name: str, dtype: str) -> NDArray[Any]:
        # mmap cannot map an empty file
        return np.memmap(self.folder / name, dtype, "r") if self.length else np.zeros(0, dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A worker started by spawn maps the files again; a pickled memmap would carry their content.
        return asdict(self)


def token_stream(
    parts: Sequence[Part],
    tokenizer: TextTokenizer,
    cache: Path,
    *,
    document_end: str | None = None,
    sized: bool = False,
    max_tokens: int | None = None,
    title: str = "text",
) -> TokenStream:
    """Return the tokens of a text, from the cache or made now.

    Args:
        parts: The text.
        tokenizer: Makes the ids.
        cache: Folder of all streams.
        document_end: A line that ends a document within a file.
        sized: Also keep how many bytes each token stands for.
        max_tokens: Cut the text after this many tokens, or None; needs ``sized``, which tells where that is in the
            text.
        title: What the progress bar calls the text.

    Raises:
        UserError: If a file cannot be read, is not UTF-8, or the cache cannot be written.
    """
    settings = [_FORMAT, digest(parts), tokenizer.to_json(), document_end, sized, max_tokens]
    folder = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if (stream := _load(folder)) is not None:
        return stream
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire()
    except OSError as error:
        raise unwritable(cache, error) from error
    try:
        if (stream := _load(folder)) is not None:
            return stream
        for leftover in folder.iterdir():
            if leftover.name != "lock":
                leftover.unlink()
        return _make(folder, _tokenized(parts, tokenizer, document_end, sized, title), tokenizer, sized, max_tokens)
    finally:
        lock.release()


def unwritable(cache: Path, error: OSError) -> UserError:
    """Return the sentence on a cache in which nothing can be written."""
    return UserError(
        f"cannot write the token cache {cache}: {error.strerror or error}; set HF_DATASETS_CACHE in the environment, "
        "or cache_dir in a recipe, to a folder in which you may write"
    )


def default_cache() -> Path:
    """Return the folder of token streams where none is set: ``bimamba_lit`` in the cache of Hugging Face datasets."""
    from huggingface_hub.constants import HF_HOME  # `datasets` itself takes half a second to import

    return Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets")).expanduser() / "bimamba_lit"


def _load(folder: Path) -> TokenStream | None:
    try:
        fields = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        stream = TokenStream(folder=folder, **fields)
        whole = (folder / "tokens.bin").stat().st_size == stream.length * np.dtype(stream.dtype).itemsize
        whole &= (folder / "starts.bin").stat().st_size == stream.documents * 8
        if stream.sized:
            whole &= (folder / "sizes.bin").stat().st_size == stream.length * 4
    except (OSError, ValueError, TypeError):
        return None
    return stream if whole else None


def _tokenized(
    parts: Sequence[Part], tokenizer: TextTokenizer, document_end: str | None, sized: bool, title: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows ``document, text, ids, sizes``; unless asked for, sizes are there only to be sliced along."""
    from datasets import IterableDataset
    from datasets.utils import tqdm

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not sized:
            ids = tokenizer.encode_batch(rows["text"])
            return {"ids": ids, "sizes": ids}
        ids, sizes = tokenizer.encode_sizes(rows["text"])
        return {"ids": ids, "sizes": sizes}

    # `datasets` takes a list among a generator's arguments for shards; a tuple is left alone.
    arguments = {
        "parts": tuple(parts),
        "document_end": document_end,
        "whole_documents": not tokenizer.splits_at_words(),
    }
    try:
        rows = IterableDataset.from_generator(pieces, gen_kwargs=arguments)
    except OSError as error:
        raise UserError(f"datasets cannot write its own cache ({error}): set HF_DATASETS_CACHE to a folder") from error
    with tqdm(
        total=size_of(parts), unit="B", unit_scale=True, desc=f"tokenizing {title}", disable=None, delay=1
    ) as bar:
        for row in rows.map(tokenize, batched=True, batch_size=_PIECES_AT_ONCE):
            yield row
            bar.update(len(row["text"].encode()))


def _make(
    folder: Path, rows: Iterator[dict[str, Any]], tokenizer: TextTokenizer, sized: bool, max_tokens: int | None
) -> TokenStream:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    content = hashlib.sha256()
    length = documents = text_tokens = text_bytes = 0
    current = None
    with ExitStack() as files:
        tokens = _writer(files, folder / "tokens.bin")
        starts = _writer(files, folder / "starts.bin")
        sizes = _writer(files, folder / "sizes.bin") if sized else None

        def write(ids: ArrayLike, row_sizes: ArrayLike) -> int:
            if sizes is not None:
                sizes.write(np.asarray(row_sizes, np.int32).tobytes())
            return tokens.write(np.asarray(ids, dtype).tobytes()) // dtype.itemsize

        for row in rows:
            ids, row_sizes, text = row["ids"], row["sizes"], row["text"].encode()
            if max_tokens is not None and text_tokens + len(ids) > max_tokens:
                ids, row_sizes = ids[: max_tokens - text_tokens], row_sizes[: max_tokens - text_tokens]
                text = text[: int(row_sizes.sum())]
            content.update(text)
            text_bytes += len(text)
            text_tokens += len(ids)
            if len(ids) and row["document"] != current:
                starts.write(np.int64(length).tobytes())
                if documents and tokenizer.separator is not None:
                    length += write([tokenizer.separator], [NOT_A_TARGET])
                length += write(ids[:1], [NOT_A_TARGET])
                documents, current = documents + 1, row["document"]
                ids, row_sizes = ids[1:], row_sizes[1:]
            length += write(ids, row_sizes)
            if text_tokens == max_tokens:
                break
    fields: dict[str, Any] = {
        "dtype": dtype.name,
        "length": length,
        "documents": documents,
        "text_tokens": text_tokens,
        "text_bytes": text_bytes,
        "sha256": content.hexdigest(),
        "sized": sized,
    }
    with replacing(folder / "stream.json") as path:
        path.write_text(json.dumps(fields), encoding="utf-8")
    return TokenStream(folder=folder, **fields)


def _writer(files: ExitStack, path: Path) -> BinaryIO:
    return files.enter_context(files.enter_context(replacing(path)).open("wb"))
