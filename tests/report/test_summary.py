import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bimamba_lit.errors import UserError
from bimamba_lit.report import Summary, TextResult, read_summary, write_summary

KEYS = (
    "name, scheme, bits_per_byte, perplexity, eval_data, context, stride, params, binarized_params, true_bits, "
    "tokens_seen, seconds, seed, teacher, version, agreement, storage, tests"
)


TESTS = (TextResult("wiki", "ab" * 32, 2.5, 5.6), TextResult("other", "cd" * 32, math.inf, math.inf))


@pytest.mark.parametrize(
    "changes", [{"tests": TESTS}, {"agreement": None, "seed": None, "teacher": "runs/teacher", "seconds": 3}]
)
def test_round_trip(summary: Callable[..., Summary], tmp_path: Path, changes: dict[str, Any]) -> None:
    written = summary(**changes)
    path = write_summary(tmp_path / "run", written)
    assert path == tmp_path / "run" / "summary.json"
    assert list(json.loads(path.read_text())) == KEYS.split(", ")
    read = read_summary(tmp_path / "run")
    assert read == written
    assert isinstance(read.seconds, float)


def test_a_diverged_result_stays_json(summary: Callable[..., Summary], tmp_path: Path) -> None:
    path = write_summary(tmp_path, summary(bits_per_byte=math.inf, perplexity=math.nan))
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    read = read_summary(tmp_path)
    assert read.bits_per_byte == math.inf
    assert math.isnan(read.perplexity)


def test_a_failed_write_leaves_the_old_file(summary: Callable[..., Summary], tmp_path: Path) -> None:
    path = write_summary(tmp_path, summary())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_summary(tmp_path, summary(teacher=tmp_path))  # a Path is no JSON
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_what_came_later_may_be_missing_from_an_older_file(summary: Callable[..., Summary], tmp_path: Path) -> None:
    path = write_summary(tmp_path, summary())
    values = json.loads(path.read_text())
    for name in ("agreement", "storage", "tests"):
        del values[name]
    path.write_text(json.dumps(values))
    read = read_summary(tmp_path)
    assert read.agreement is None and read.storage is None and read.tests == ()


def test_missing_folders_and_files(summary: Callable[..., Summary], tmp_path: Path) -> None:
    write_summary(tmp_path / "student-2", summary())
    with pytest.raises(UserError, match=r"no run folder .*studnet-2; did you mean 'student-2'\?"):
        read_summary(tmp_path / "studnet-2")
    with pytest.raises(UserError, match="no run folder"):
        read_summary(tmp_path / "nowhere" / "at-all")
    with pytest.raises(UserError, match="is a file, where a run folder is needed"):
        read_summary(tmp_path / "student-2" / "summary.json")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(UserError, match=r"unfinished has no summary.json: its run is not finished"):
        read_summary(tmp_path / "unfinished")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is cut off or no JSON"),
        (lambda text: "", "is cut off or no JSON"),
        (lambda text: "[" * 100_000, "is cut off or no JSON"),
        (lambda text: "[1]", "holds no JSON object"),
        (lambda text: text.replace('"stride"', '"strides"'), "unknown key 'strides'; did you mean 'stride'"),
        (lambda text: text.replace('  "stride": 128,\n  "params": 2000000,\n', ""), "lacks params, stride"),
        (lambda text: text.replace("13.4", '"low"'), "perplexity is 'low', where a number is needed"),
        (lambda text: text.replace("13.4", "true"), "perplexity is True, where a number is needed"),
        (lambda text: text.replace("128", "128.5"), "stride is 128.5, where a whole number is needed"),
        (lambda text: text.replace("128", "null"), "stride is None, where a whole number is needed"),
        (lambda text: text.replace('"FBI"', "1"), "scheme is 1, where text is needed"),
        (lambda text: text.replace('"sha256"', '"sha1"'), "where an object of name and sha256 is needed"),
    ],
)
def test_damaged_files(
    summary: Callable[..., Summary], tmp_path: Path, damage: Callable[[str], str], message: str
) -> None:
    path = write_summary(tmp_path, summary())
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with pytest.raises(UserError, match=message):
        read_summary(tmp_path)


def test_bytes_that_are_no_text(summary: Callable[..., Summary], tmp_path: Path) -> None:
    write_summary(tmp_path, summary()).write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is cut off or no JSON"):
        read_summary(tmp_path)
