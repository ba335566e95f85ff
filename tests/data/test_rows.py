"""Tables as documents: what is read is what was written, and every fault is told with its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bimamba_lit.data import Source, TextDataModule
from bimamba_lit.data.rows import FileRows, HubRows
from bimamba_lit.data.source import as_sources, parts_of, without_held_out
from bimamba_lit.data.sources import Span, digest, pieces
from bimamba_lit.errors import UserError

TEXTS = ["naïve 漢字 🎉\r\n\t end", "", "the second\n\n", "x" * 70_000 + " and more words " * 9000, "the last"]


def write(kind: str, folder: Path, texts: list[str] = TEXTS) -> Path:
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    if kind == "parquet":
        Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).to_parquet(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines + "\n", encoding="utf-8")
    return path


def documents(parts: list[Any]) -> list[str]:
    found: dict[int, str] = {}
    for piece in pieces(parts, None, whole_documents=False):
        assert len(piece["text"]) < 80_000
        found[piece["document"]] = found.get(piece["document"], "") + piece["text"]
    return [found.get(i, "") for i in range(max(found) + 1)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_rows_are_documents_to_the_byte(kind: str, tmp_path: Path) -> None:
    assert documents([FileRows(write(kind, tmp_path))]) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_last_rows_are_held_out(kind: str, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(41)]
    rows = FileRows(write(kind, tmp_path, texts))
    kept, held = without_held_out([rows])
    assert documents(kept) == texts[:38] and documents(held) == texts[38:]
    assert len({digest([part]) for part in (rows, *kept, *held)}) == 3
    with pytest.raises(UserError, match="cannot both be held out from: set val"):
        without_held_out([rows, Span(tmp_path / "a.txt")])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "line 2: not a line of JSON"),
        ("\xff", "line 2"),
        pytest.param("[" * 100_000, "line 2: not a line of JSON", id="deep"),
        ("[1]", "line 2: a JSON object is needed, not list"),
        ('{"txt": "a", "id": 3}', r"line 2: there is no column 'text' \(there: 'txt', 'id'\); did you mean 'txt'"),
        ('{"text": 3}', "line 2: 'text' holds int, and text is needed"),
        (r'{"text": "\ud800"}', "line 2: 'text' holds half a character"),
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=words) as told:
        documents([FileRows(path)])
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_files_that_are_cut_off_or_lack_the_column(tmp_path: Path) -> None:
    parquet = write("parquet", tmp_path)
    with pytest.raises(UserError, match=r"no column 'txt' \(there: 'id', 'text'\); did you mean 'text'"):
        documents([FileRows(parquet, "txt")])
    parquet.write_bytes(parquet.read_bytes()[:-30])
    with pytest.raises(UserError, match="is no Parquet file, or is damaged or cut short"):
        documents([FileRows(parquet)])
    packed = write("jsonl.gz", tmp_path)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"cannot read {packed}"):
        documents([FileRows(packed)])
    with pytest.raises(UserError, match="Parquet is compressed inside"):
        documents([FileRows(tmp_path / "a.parquet.gz")])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    data = Dataset.from_dict({"text": [f"row {i}" for i in range(40)], "other": ["no"] * 40})

    def load(name: str, subset: str | None, split: str, streaming: bool) -> Any:
        assert (name, subset, split) == ("owner/name", "en", "train")
        return data.to_iterable_dataset(num_shards=4) if streaming else data

    monkeypatch.setattr("datasets.load_dataset", load)
    return data


def test_a_hub_data_set_is_read_whole_held_out_and_in_shards(hub: Dataset) -> None:
    source = Source("hub:owner/name", subset="en")
    assert documents(source.parts("train")) == hub["text"][:]
    kept, held = without_held_out(source.parts("train"))
    assert documents(kept) + documents(held) == hub["text"][:] and len(documents(held)) == 2
    assert documents(source.parts("val", streaming=True)) == hub["text"][:]
    shards = source.parts("train", streaming=True, in_shards=True)
    assert len(shards) == 4
    assert sorted(text for shard in shards for text in documents([shard])) == sorted(hub["text"][:])
    with pytest.raises(UserError, match=r"hub:owner/name: there is no column 'txt' .*did you mean 'text'"):
        documents(Source("hub:owner/name", subset="en", column="txt").parts("train"))


def test_a_hub_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        UserError, match=r"hub:owner/name \(subset None, split 'train'\) cannot be loaded .*: no network$"
    ):
        HubRows("owner/name").digest()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"text": "a.txt", "wieght": 2}, "train: a source has no key 'wieght'; did you mean 'weight'"),
        ({"weight": 2}, "train: a source needs the key 'text'"),
        ({"text": "a.txt", "weight": "two"}, "the weight of a.txt is 'two'"),
        ({"text": "a.txt", "weight": 0}, "weight: 0 of a.txt must be above 0"),
    ],
)
def test_sources_that_are_wrong(source: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        as_sources([source], "train")


def test_a_module_reads_tables_and_text_of_one_folder(tmp_path: Path) -> None:
    write("jsonl", tmp_path, ["one two three"] * 5)
    write("parquet", tmp_path, ["four five six"] * 5)
    (tmp_path / "a.txt").write_text("seven eight nine")
    module = TextDataModule(
        train=str(tmp_path), val=str(tmp_path), context=8, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    module.setup("fit")
    (stream,) = module._streams["train"]
    assert stream.documents == 11 and stream.text_bytes == 16 + 5 * 26


def test_what_is_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out with one copy and trained on with the other, a model would be measured on what it has seen."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(100)))
    monkeypatch.chdir(tmp_path)
    twice = ["a.txt", str(tmp_path), "c.txt", {"text": str(tmp_path / "?.txt")}]
    module = TextDataModule(train=twice, context=8, cache_dir=str(tmp_path / "cache"))
    module.setup("fit")
    (train,), (val,) = module._streams["train"], module._streams["val"]
    assert train.documents == 3 and val.documents == 1
    assert train.text_bytes + val.text_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
    rows = write("jsonl", tmp_path, ["one two three"] * 5)
    assert len(parts_of(as_sources(["rows.jsonl", str(rows)], "train"), "train")) == 1
    columns = [Source("rows.jsonl"), Source("rows.jsonl", column="other")]
    assert len(parts_of(columns, "train")) == 2
