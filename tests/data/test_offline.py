import hashlib
import sysconfig
from pathlib import Path

import pytest

from bimamba_lit.data import offline
from bimamba_lit.data.offline import MODULES, offline_corpus, offline_files
from bimamba_lit.errors import UserError


def test_files_are_held_out_whole_and_by_name() -> None:
    files = offline_files()
    root = Path(sysconfig.get_path("stdlib"))
    names = {split: [path.relative_to(root).as_posix() for path in paths] for split, paths in files.items()}
    everything = [name for split in names.values() for name in split]
    assert len(everything) == len(set(everything))
    assert all(split == sorted(split) for split in names.values())
    assert "json/decoder.py" in names["train"]
    assert "typing.py" in names["val"]
    assert "tomllib/_parser.py" in names["test"]
    parts = {part for name in everything for part in name.split("/")}
    assert not parts & {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "distutils", "site-packages"}
    assert {name.split("/")[0].removesuffix(".py") for name in everything} == set(MODULES)


def test_size_and_shares() -> None:
    corpus = offline_corpus()
    sizes = [sum(len(text.encode()) for text in split) for split in corpus]
    assert 5e6 < sum(sizes) < 9e6
    assert all(0.02 < size / sum(sizes) < 0.06 for size in sizes[1:])
    assert corpus.sha256 == hashlib.sha256(b"".join(text.encode() for split in corpus for text in split)).hexdigest()
    assert corpus.sha256 == offline_corpus().sha256


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="has no module '__future__'"):
        offline_corpus()
