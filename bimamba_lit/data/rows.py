"""Tables as documents: a column of JSON lines, of a Parquet file or of a hub data set, a document a row."""

import json
import lzma
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bimamba_lit.data.sources import decode, file_digest, open_file
from bimamba_lit.errors import UserError, nearest

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".xz", ".gz", ".bz2")


def is_table(path: Path) -> bool:
    """Tell by a file's name whether it holds JSON lines or is a Parquet file, compressed or not."""
    return _kind(path) in (*_JSON_LINES, ".parquet")


def is_json_lines(path: Path) -> bool:
    """Tell by a file's name whether it holds JSON lines, compressed or not."""
    return _kind(path) in _JSON_LINES


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


@dataclass(frozen=True)
class FileRows:
    """Rows ``start`` to ``stop`` (or to the end) of a file of JSON lines or a Parquet file."""

    path: Path
    column: str = "text"
    start: int = 0
    stop: int | None = None

    def texts(self, document_end: str | None) -> Iterator[tuple[str, bool]]:
        """Yield each row's text, a document; `document_end` means nothing here."""
        rows = _json_lines(self.path, self.column) if is_json_lines(self.path) else _parquet(self)
        for text in islice(rows, self.start, self.stop):
            yield text, True

    def digest(self) -> str:
        """Return a line with the SHA-256 of the file and what of it is read."""
        return f"{file_digest(self.path)} {_kind(self.path)} {self.column} {self.start} {self.stop}"

    def size(self) -> int | None:
        """Return None: the bytes of a column are known once it is read."""
        return None

    def count(self) -> int:
        """Return the number of rows of the file."""
        if is_json_lines(self.path):
            return sum(1 for _ in _lines(self.path))
        return int(_open_parquet(self.path).metadata.num_rows)

    def between(self, start: int, stop: int | None) -> "FileRows":
        """Return the same, of other rows."""
        return replace(self, start=start, stop=stop)


@dataclass(frozen=True)
class HubRows:
    """Rows of a data set of the Hugging Face hub; ``shard`` of ``shards`` where it is streamed in parts."""

    name: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    start: int = 0
    stop: int | None = None
    streaming: bool = False
    shard: int = 0
    shards: int = 1

    def texts(self, document_end: str | None) -> Iterator[tuple[str, bool]]:
        """Yield each row's text, a document; `document_end` means nothing here."""
        rows = self._load()
        if rows.column_names is not None and self.column not in rows.column_names:
            raise _no_column(f"hub:{self.name}", self.column, rows.column_names)
        if self.shards > 1:
            rows = rows.shard(num_shards=self.shards, index=self.shard)
        if not self.streaming and (self.start or self.stop is not None):
            rows = rows.select(range(self.start, len(rows) if self.stop is None else self.stop))
        for number, row in enumerate(rows, start=self.start + 1):
            yield _text(row, self.column, f"hub:{self.name}, row {number}"), True

    def digest(self) -> str:
        """Return a line that stands for the data as `datasets` has them; streamed, for their name alone.

        To tell which revision it is takes a network, which what is kept should not.
        """
        whose = "" if self.streaming else self._load()._fingerprint
        return f"hub {self.name} {self.subset} {self.split} {self.column} {whose} {self.start} {self.stop}"

    def size(self) -> int | None:
        """Return None: the bytes of a column are known once it is read."""
        return None

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._load())

    def between(self, start: int, stop: int | None) -> "HubRows":
        """Return the same, of other rows."""
        return replace(self, start=start, stop=stop)

    def sharded(self) -> list["HubRows"]:
        """Return the parts in which it can be streamed."""
        count = int(getattr(self._load(), "num_shards", 1))
        return [replace(self, shard=shard, shards=count) for shard in range(count)]

    def _load(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        except Exception as error:  # whatever lies below: HTTP, files, the set's own description
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the data set hub:{self.name} (subset {self.subset}, split {self.split!r}) cannot be loaded from the "
                f"Hugging Face hub or its cache: {reason[0]}"
            ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not blank."""
    with closing(open_file(path)) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"cannot read {path}: {error}") from error


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, compressed or not, each after where it stands, for messages.

    Raises:
        UserError: If the file cannot be read or a line is not a JSON object.
    """
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(decode(line, path, 0))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a line of JSON ({error}); mend or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield where, row


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for where, row in json_objects(path):
        yield _text(row, column, where)


def _parquet(part: FileRows) -> Iterator[str]:
    from pyarrow import ArrowException

    file = _open_parquet(part.path)
    if part.column not in file.schema_arrow.names:
        raise _no_column(str(part.path), part.column, file.schema_arrow.names)
    number = 0
    try:
        for batch in file.iter_batches(columns=[part.column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text({part.column: value}, part.column, f"{part.path}, row {number}")
    except (ArrowException, OSError) as error:
        raise UserError(f"{part.path} is damaged after row {number}: {error}") from error


def _open_parquet(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if path.suffix in _COMPRESSED:
        raise UserError(f"{path}: Parquet is compressed inside; unpack it, {path.suffix} around it is not read")
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or is damaged or cut short: {error}") from error


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} holds {type(text).__name__}, and text is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {column!r} holds half a character, which UTF-8 cannot write ({error.reason})"
        ) from error
    return text


def _no_column(where: str, column: str, names: list[str]) -> UserError:
    there = ", ".join(repr(name) for name in names[:12]) or "none"
    return UserError(f"{where}: there is no column {column!r} (there: {there}){nearest(column, names)}; set column")
