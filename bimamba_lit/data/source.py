"""What the settings ``train``, ``val`` and ``test`` may name, and what is read for each."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bimamba_lit.data.rows import FileRows, HubRows, is_table
from bimamba_lit.data.sources import HELD_OUT, Part, Span, find_files, hold_out
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.hub import hub_name


@dataclass(frozen=True)
class Source:
    """A text and how much of it to read.

    Args:
        text: The path of a file, of a folder or a glob pattern, or ``hub:OWNER/NAME``, a data set of the Hugging Face
            hub. Files are text, JSON lines (.jsonl, .ndjson, .json) or Parquet (.parquet).
        weight: How often an epoch of training reads it, such as 2 or 0.5; parts of an epoch follow one another, so that
            two epochs of weight 0.5 read all of it.
        column: The column of a table that holds the text, one document a row.
        subset: The subset (configuration) of a hub data set.
        split: The split of a hub data set.

    Raises:
        UserError: If the weight is not above 0.
    """

    text: str
    weight: float = 1.0
    column: str = "text"
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight: {self.weight} of {self.text} must be above 0; leave a source out instead of 0")

    def parts(self, key: str, streaming: bool = False, in_shards: bool = False) -> list[Part]:
        """Return what is to be read.

        Args:
            key: The setting's name, for messages.
            streaming: Whether a hub data set is read over the network as far as it is needed; else all of it, with its
                other splits, is fetched and kept by `datasets`.
            in_shards: Whether a streamed one is read in the parts in which it is stored.

        Raises:
            UserError: If nothing is there.
        """
        if (name := hub_name(self.text)) is not None:
            rows = HubRows(name, self.subset, self.split, self.column, streaming=streaming)
            return [*rows.sharded()] if in_shards else [rows]
        return [part_of(path, self.column) for path in find_files(self.text, key)]

    @property
    def name(self) -> str:
        """What a summary calls it: nothing about the machine's folders."""
        return self.text if hub_name(self.text) is not None else Path(self.text).name


def part_of(path: Path, column: str) -> Part:
    """Return the whole of a file, as its name says what it is."""
    return FileRows(path, column) if is_table(path) else Span(path)


def parts_of(sources: Sequence[Source], key: str, streaming: bool = False, in_shards: bool = False) -> list[Part]:
    """Return what is to be read of several sources; what two of them name is read once.

    Twice, it would be held out with its second copy and trained on with its first.

    Args:
        sources: The sources.
        key: As of :meth:`Source.parts`, as are the others.
        streaming: Likewise.
        in_shards: Likewise.

    Raises:
        UserError: If nothing is there.
    """
    found: dict[Part, Part] = {}
    for source in sources:
        for part in source.parts(key, streaming, in_shards):
            found.setdefault(_with_full_path(part), part)
    return list(found.values())


def _with_full_path(part: Part) -> Part:
    return replace(part, path=part.path.resolve()) if isinstance(part, (Span, FileRows)) else part


def text_of(part: Part) -> Hashable:
    """Return the file or the data set that a part is of, whichever of its bytes, columns or shards are read."""
    if isinstance(part, HubRows):
        return part.name, part.subset, part.split
    assert isinstance(part, (Span, FileRows))
    return part.path.resolve()


# What a recipe may say: jsonargparse would take the name of a file for a configuration, were `Source` among the types.
Setting = str | dict[str, Any] | list[str | dict[str, Any]]


def as_sources(setting: "Setting | Source | Sequence[str | dict[str, Any] | Source]", key: str) -> list[Source]:
    """Return a setting as a list of sources.

    Raises:
        UserError: If it is an empty list, or a source is not described by the keys of `Source`.
    """
    several = [setting] if isinstance(setting, (str, dict, Source)) else list(setting)
    if not several:
        raise UserError(f"{key}: the list of text files is empty")
    return [_source(one, key) for one in several]


def _source(one: str | dict[str, Any] | Source, key: str) -> Source:
    if isinstance(one, Source):
        return one
    if isinstance(one, str):
        return Source(one)
    names = [field.name for field in fields(Source)]
    for name in one:
        if name not in names:
            raise UserError(
                f"{key}: a source has no key {name!r}{nearest(str(name), names)} (it has {', '.join(names)})"
            )
    if not isinstance(one.get("text"), str):
        raise UserError(f"{key}: a source needs the key 'text', a path or hub:OWNER/NAME, and has {one!r}")
    weight = one.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise UserError(f"{key}: the weight of {one['text']} is {weight!r}, and a number is needed")
    return Source(**one)


def without_held_out(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Split parts into text to train on and the held-out rest: the last `HELD_OUT` of the bytes, or of the rows.

    Raises:
        UserError: If there are both text files and tables, whose sizes do not compare.
    """
    spans = [part for part in parts if isinstance(part, Span)]
    tables = [part for part in parts if isinstance(part, (FileRows, HubRows))]
    if not tables:
        kept, held = hold_out([span.path for span in spans])
        return [*kept], [*held]
    if spans:
        raise UserError("val: text files and tables cannot both be held out from: set val")
    counts = [table.count() for table in tables]
    cut = int(sum(counts) * (1 - HELD_OUT))
    first: list[Part] = []
    rest: list[Part] = []
    for table, count in zip(tables, counts, strict=True):
        at = min(max(cut, 0), count)
        if at > 0:
            first.append(table.between(0, at))
        if at < count:
            rest.append(table.between(at, None))
        cut -= count
    return first, rest
