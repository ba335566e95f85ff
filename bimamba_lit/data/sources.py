r"""Text files as documents, read in pieces.

`datasets` has a text reader; it turns ``\r\n`` into ``\n`` and holds a whole document in memory. Bits per byte
needs the bytes as they are, and a file of gigabytes may be one document, so files are read here: in pieces of about
sixty thousand characters, cut where the tokenizer cuts as well (between a letter and a space or line end), and handed
to `datasets` one by one.
"""

import bz2
import glob
import gzip
import hashlib
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict, cast

from bimamba_lit.errors import UserError, nearest

_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")
_FOLDER_NAMES = tuple(kind + suffix for kind in _KINDS for suffix in ("", *_OPENERS))
_PIECE = 1 << 16
_WORD_END = re.compile(r"(?<=[^\W\d_])[ \n]")
HELD_OUT = 0.05


class Part(Protocol):
    """Something that documents are read from: a span of a text file, or a column of a table."""

    def texts(self, document_end: str | None) -> Iterator[tuple[str, bool]]:
        """Yield text in order, and whether the document ends with it."""

    def digest(self) -> str:
        """Return a line that stands for the content, wherever it lies."""

    def size(self) -> int | None:
        """Return the bytes of text, or None where that takes reading all of it."""


@dataclass(frozen=True)
class Span:
    """The bytes of a file's (uncompressed) text from ``start`` to ``stop``, or to its end."""

    path: Path
    start: int = 0
    stop: int | None = None

    def texts(self, document_end: str | None) -> Iterator[tuple[str, bool]]:
        """Yield runs of whole lines, and whether the document ends with them; a line `document_end` ends one too."""
        return _texts(self, document_end)

    def digest(self) -> str:
        """Return a line with the SHA-256 of the file and what of it is read."""
        packed = self.path.suffix if self.path.suffix in _OPENERS else ""
        return f"{file_digest(self.path)} {packed} {self.start} {self.stop}"

    def size(self) -> int | None:
        """Return the bytes of text, or None where that takes decompressing the file."""
        if self.stop is None and self.path.suffix in _OPENERS:
            return None
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start


class Piece(TypedDict):
    """Some text of a document: documents are numbered in order, and the pieces of one follow one another."""

    document: int
    text: str


def find_files(name: str, key: str) -> list[Path]:
    """Return the files that a setting names, each once.

    Args:
        name: The path of a file (plain, or compressed as .xz, .gz or .bz2), of a folder (its .txt, .jsonl, .ndjson and
            .parquet files, compressed or not, at any depth, in order of name) or a glob pattern. Empty files found in
            a folder or by a pattern are left out.
        key: The setting's name, for messages.

    Raises:
        UserError: If the path does not exist, a folder or pattern holds no text, or a named file is empty.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if _is_empty(path):
            raise UserError(f"{key}: the file {path} is empty")
        return [path]
    if path.is_dir():
        candidates = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_FOLDER_NAMES))
        lacking = f"the folder {path} holds no file named {', '.join('*' + n for n in _FOLDER_NAMES)}"
    elif glob.has_magic(name):
        candidates = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        lacking = f"no file matches the pattern '{name}'"
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{key}: '{name}' is not a file or folder (accepted: 'offline', or the paths of local text files, "
            f"folders or glob patterns){nearest(path.name, [*siblings, 'offline'])}"
        )
    if not candidates:
        raise UserError(f"{key}: {lacking}")
    full = [p for p in candidates if not _is_empty(p)]
    if not full:
        raise UserError(f"{key}: all files of '{name}' are empty")
    return list(dict.fromkeys(full))


def hold_out(files: Sequence[Path]) -> tuple[list[Span], list[Span]]:
    """Split files into text to train on and a held-out rest: the last `HELD_OUT` of all bytes, from the next line on.

    Files are taken in order, so many small documents lose the last ones and a single document loses its tail. Where no
    line ends in what is left of a file, the cut is at the next character.
    """
    sizes = [_text_size(path) for path in files]
    cut = int(sum(sizes) * (1 - HELD_OUT))
    kept: list[Span] = []
    held: list[Span] = []
    for path, size in zip(files, sizes, strict=True):
        if cut >= size:
            kept.append(Span(path))
        elif cut <= 0:
            held.append(Span(path))
        else:
            at = _next_line(path, cut, size)
            kept.append(Span(path, 0, at))
            held.append(Span(path, at))
        cut -= size
    return kept, held


def digest(parts: Sequence[Part]) -> str:
    """Return a SHA-256 of the content of parts, wherever their files lie."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(f"{part.digest()}\n".encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as it lies on disk."""
    with closing(open_file(path, decompress=False)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def size_of(parts: Sequence[Part]) -> int | None:
    """Return the bytes of text in parts, or None where that takes reading all of it."""
    sizes = [part.size() for part in parts]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def pieces(parts: Sequence[Part], document_end: str | None, whole_documents: bool) -> Iterator[Piece]:
    """Yield the text of parts in order, in pieces that can be tokenized one by one.

    Args:
        parts: What to read; each begins a new document.
        document_end: A line that ends a document within a file and is not part of it, or None.
        whole_documents: Never cut a document, for tokenizers whose tokens depend on more than the word they are in.

    Raises:
        UserError: If a file cannot be read or is not UTF-8.
    """
    document = 0
    for part in parts:
        carry = ""
        for text, ends in part.texts(document_end):
            searched, start, carry = len(carry), 0, carry + text
            while not whole_documents and (word := _WORD_END.search(carry, max(start + _PIECE, searched))):
                yield {"document": document, "text": carry[start : word.start()]}
                start = word.start()
            carry = carry[start:]
            if ends:
                if carry:
                    yield {"document": document, "text": carry}
                document, carry = document + 1, ""


def _texts(span: Span, document_end: str | None) -> Iterator[tuple[str, bool]]:
    """Yield runs of whole lines, and whether the document ends with them."""
    marker = None if document_end is None else document_end.encode()
    offset = span.start
    with closing(open_file(span.path)) as file:
        while True:
            try:
                if offset == span.start:
                    file.seek(span.start)
                lines = file.readlines(_PIECE if span.stop is None else min(_PIECE, span.stop - offset))
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise UserError(f"cannot read {span.path}: {error}") from error
            if span.stop is not None:
                lines = _first_bytes(lines, span.stop - offset)
            run: list[bytes] = []
            for line in lines:
                if marker is not None and line.rstrip(b"\r\n") == marker:
                    yield decode(b"".join(run), span.path, offset), True
                    offset += sum(map(len, run)) + len(line)
                    run = []
                else:
                    run.append(line)
            data = b"".join(run)
            last = not lines or offset + len(data) == span.stop
            yield decode(data, span.path, offset), last
            offset += len(data)
            if last:
                return


def decode(data: bytes, path: Path, offset: int) -> str:
    """Return the text of bytes that lie at ``offset`` of a file.

    Raises:
        UserError: If they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {offset + error.start} cannot be decoded ({error.reason}); "
            "convert the file to UTF-8"
        ) from error


def _first_bytes(lines: list[bytes], count: int) -> list[bytes]:
    kept: list[bytes] = []
    for line in lines:
        if count <= 0:
            break
        kept.append(line[:count])
        count -= len(line)
    return kept


def open_file(path: Path, decompress: bool = True) -> IO[bytes]:
    """Open a file to read its bytes, decompressed where its name says how.

    Raises:
        UserError: If it cannot be opened.
    """
    try:
        opener = _OPENERS.get(path.suffix, open) if decompress else open
        return cast(IO[bytes], opener(path, "rb"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _is_empty(path: Path) -> bool:
    if path.suffix not in _OPENERS:
        return path.stat().st_size == 0
    return _text_size(path, limit=1) == 0


def _text_size(path: Path, limit: int | None = None) -> int:
    if path.suffix not in _OPENERS:
        return path.stat().st_size
    size = 0
    with closing(open_file(path)) as file:
        try:
            while (limit is None or size < limit) and (block := file.read(1 << 20)):
                size += len(block)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    return size


def _next_line(path: Path, cut: int, size: int) -> int:
    with closing(open_file(path)) as file:
        file.seek(cut)
        line = file.readline()
    if cut + len(line) < size:
        return cut + len(line)
    begun = next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)
    return cut + begun
