"""Checkpoint files are whole or are not taken for one."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from bimamba_lit.training import checkpoint_file
from bimamba_lit.training.checkpoint_file import EXACT, WholeCheckpointIO, newest_whole


def checkpoint(step: int) -> dict[str, Any]:
    return {"global_step": step, "weights": torch.arange(5000.0), EXACT: True}


def damaged(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    return {
        "empty": b"",
        "cut off": content[: half * 2 - 300],
        "zeros at its end": content[:half] + bytes(len(content) - half),
        "zeros": bytes(len(content)),
        "garbage": os.urandom(len(content)),
        "one bit within": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut off", "zeros at its end", "zeros", "garbage", "one bit within"])
def test_a_broken_one_is_passed_over_and_named(tmp_path: Path, how: str) -> None:
    writer = WholeCheckpointIO()
    for step, name in enumerate(("step=1.ckpt", "step=2.ckpt", "last.ckpt"), start=1):
        writer.save_checkpoint(checkpoint(step), tmp_path / name)
        os.utime(tmp_path / name, (step, step))
    assert newest_whole(tmp_path, "last.ckpt") == (tmp_path / "last.ckpt", [])
    for name in ("last.ckpt", "step=2.ckpt"):
        before = (tmp_path / name).stat()
        (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes(), how))
        os.utime(tmp_path / name, (before.st_atime, before.st_mtime))
    found, told = newest_whole(tmp_path, "last.ckpt")
    assert found == tmp_path / "step=1.ckpt"
    assert [line.partition(" is broken (")[0] for line in told] == [
        str(tmp_path / "last.ckpt"),
        str(tmp_path / "step=2.ckpt"),
    ]


class Allocate:
    def __reduce__(self) -> Any:
        return bytearray, (1 << 30,)


def test_one_that_asks_for_memory_is_passed_over_without_giving_it(tmp_path: Path) -> None:
    torch.save(checkpoint(1) | {"more": Allocate()}, tmp_path / "last.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, (told,) = newest_whole(tmp_path, "last.ckpt")
    assert found is None and "plain tensors and values, and nothing else is opened" in told
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1 << 28


def test_one_that_does_not_resume_exactly_is_passed_over(tmp_path: Path) -> None:
    writer = WholeCheckpointIO()
    assert newest_whole(tmp_path, "last.ckpt") == (None, [])
    writer.save_checkpoint({"global_step": 3}, tmp_path / "best.ckpt")
    assert newest_whole(tmp_path, "last.ckpt") == (None, [])
    writer.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    os.utime(tmp_path / "last.ckpt", (1, 1))
    assert newest_whole(tmp_path, "last.ckpt") == (tmp_path / "last.ckpt", [])


def test_a_write_that_fails_leaves_the_old_ones_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    writer = WholeCheckpointIO()
    for name in ("last.ckpt", "older.ckpt"):
        writer.save_checkpoint(checkpoint(1), tmp_path / name)
    real = checkpoint_file._Watched.write

    def write(self: Any, data: Any) -> int:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 5:
            self.file = Failing()
        return real(self, data)

    class Failing:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            pass

    monkeypatch.setattr(checkpoint_file._Watched, "write", write)
    writer.save_checkpoint(checkpoint(2), tmp_path / "last.ckpt")
    writer.remove_checkpoint(tmp_path / "older.ckpt")
    monkeypatch.undo()
    told = f"cannot write {tmp_path / 'last.ckpt'}: No space left on device"
    assert writer.failure == told
    assert capsys.readouterr().err == f"bimamba: {told}; the last checkpoint stays and training goes on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "older.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    writer.save_checkpoint(checkpoint(3), tmp_path / "last.ckpt")
    writer.remove_checkpoint(tmp_path / "older.ckpt")
    assert writer.failure is None and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
