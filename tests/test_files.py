import os
import re
import stat
from pathlib import Path

import pytest

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing, replacing_all


def test_the_new_content_comes_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with replacing(target) as temporary:
            temporary.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_the_new_content_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch):
    done = []
    sync, move = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append("moved"), move(path, to)))
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("x")
        file = temporary.stat().st_ino
    assert done == [file, "moved", tmp_path.stat().st_ino]


def test_what_fails_midway_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyError), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_midway_is_not_left_behind_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("new", "mine/new/deep", "mine"):
        with pytest.raises(KeyError), replacing_all(tmp_path / folder, ["one", "two"]) as files:
            files["one"].write_text("half")
            raise KeyError
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_files_are_readable_as_the_umask_says(tmp_path):
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("x")
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


@pytest.mark.parametrize("target", ["file/below", "folder"])
def test_a_target_that_cannot_be_written_is_told(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"cannot write .*{target}"), replacing(tmp_path / target) as temporary:
        temporary.write_text("x")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["file/below", "file/further/below"])
def test_a_file_where_a_folder_is_needed_is_named(tmp_path, target):
    (tmp_path / "file").touch()
    told = f"cannot write {tmp_path / target}: {tmp_path / 'file'} is a file, and a folder is needed"
    with pytest.raises(UserError, match=re.escape(told)), replacing(tmp_path / target):
        pass


def test_nearest_names_a_close_word_only():
    assert nearest("contxt", ["context", "stride"]) == "; did you mean 'context'?"
    assert nearest("zzz", ["context", "stride"]) == ""
