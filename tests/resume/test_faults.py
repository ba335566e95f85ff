"""A full disk, a lost folder, text that goes away, a worker that dies: one sentence or going on, and nothing lost."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bimamba_lit.training.command_line import is_worker_death


@pytest.fixture
def plain(recipe: Any, tmp_path: Path) -> Any:
    """Returns the command of a run of 24 steps, a checkpoint every fourth, and its folder."""

    def write(seconds: float = 0.0, **changed: Any) -> tuple[list[str], Path]:
        folder = tmp_path / "run"
        noise = {"class_path": "noise.Noise", "init_args": {"seconds": seconds}}
        default: dict[str, Any] = {"trainer__accumulate_grad_batches": 1, "trainer__callbacks": [noise]}
        return ["fit", "-c", str(recipe(folder, **default | changed))], folder

    return write


def saved(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


def complaints(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("bimamba: ")]


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(zygote: Any, plain: Any) -> None:
    args, folder = plain()
    run = zygote.start(*args, fault={"first": 2, "last": 3, "call": 10})
    assert run.wait() == 0, run.said()
    told = f"bimamba: cannot write {folder}/checkpoints/last.ckpt: No space left on device; the last checkpoint stays"
    assert complaints(run.said()) == [f"{told} and training goes on"] * 2
    assert saved(folder) == 24 and [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_folder_lost_on_the_way_keeps_the_last_checkpoint(zygote: Any, plain: Any) -> None:
    args, folder = plain(seconds=0.05)
    run = zygote.start(*args)
    run.until((folder / "checkpoints" / "last.ckpt").exists)
    kept = (folder / "checkpoints").rename(folder / "aside")
    (folder / "checkpoints").touch()
    assert run.wait() == 1, run.said()
    *told, last = complaints(run.said())
    assert told and all("the last checkpoint stays and training goes on" in line for line in told)
    assert f"cannot write {folder}/checkpoints/last.ckpt" in last and "training is through but not saved" in last
    (folder / "checkpoints").unlink()
    kept.rename(folder / "checkpoints")
    step = saved(folder)
    assert 0 < step < 24 and step % 4 == 0
    again = zygote.start(*args, "--ckpt_path", "last")
    assert again.wait() == 0 and saved(folder) == 24, again.said()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_streamed_text_that_goes_away_is_named_and_nothing_is_lost(
    zygote: Any, plain: Any, tmp_path: Path, workers: int
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    args, folder = plain(
        seconds=0.05,
        data__init_args__train=str(texts),
        data__init_args__streaming=True,
        data__init_args__workers=workers,
    )
    run = zygote.start(*args)
    run.until((folder / "checkpoints" / "last.ckpt").exists)
    texts.rename(tmp_path / "aside")
    assert run.wait() == 1, run.said()
    (told,) = complaints(run.said())
    assert str(texts) in told and "No such file" in told and len(told) < 300
    assert saved(folder) >= 4


@pytest.mark.slow
def test_cached_text_that_goes_away_is_not_missed(zygote: Any, plain: Any, tiny: Any, tmp_path: Path) -> None:
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    shutil.copy(tiny.text, text)
    args, folder = plain(seconds=0.02, data__init_args__train=str(text), data__init_args__cache_dir=str(cache))
    run = zygote.start(*args)
    run.until((folder / "checkpoints" / "last.ckpt").exists)
    text.unlink()
    shutil.rmtree(cache)
    assert run.wait() == 0 and saved(folder) == 24, run.said()


def test_a_worker_that_dies_is_told_and_the_last_checkpoint_stays(zygote: Any, plain: Any) -> None:
    args, folder = plain(seconds=0.05, data__init_args__workers=2)
    run = zygote.start(*args)
    run.until((folder / "checkpoints" / "last.ckpt").exists)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert run.wait() == 1, run.said()
    (told,) = complaints(run.said())
    assert "a data worker ended" in told and "--ckpt_path last" in told
    assert 0 < saved(folder) < 24


def test_a_worker_that_dies_in_the_midst_of_other_code_is_told_all_the_same(zygote: Any, plain: Any) -> None:
    args, folder = plain(trainer__callbacks=[{"class_path": "noise.LosesAWorker"}], data__init_args__workers=1)
    run = zygote.start(*args)
    assert run.wait() == 1, run.said()
    (told,) = complaints(run.said())
    assert "a data worker ended (DataLoader worker" in told and "--ckpt_path last" in told
    assert saved(folder) == 4


def send_and_wait(queue: Any) -> None:
    queue.put(torch.zeros(3))
    signal.pause()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_batch_of_a_worker_that_has_just_died_tells_of_it() -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=send_and_wait, args=(queue,))
    worker.start()
    while queue.empty():
        time.sleep(0.01)
    worker.kill()
    worker.join()
    with pytest.raises(OSError) as lost:  # which says nothing of a worker
        queue.get()
    assert is_worker_death(lost.value)
    with pytest.raises(OSError) as other, socket.socket(socket.AF_UNIX) as connection:
        connection.connect("nowhere")
    assert not is_worker_death(other.value)


@pytest.mark.slow
def test_a_disk_that_is_really_full(zygote: Any, plain: Any, compare: Any, tmp_path: Path) -> None:
    """Everything a run writes has no space for a while; in the end nothing of it is missing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        settings = {"checkpoint__every_n_train_steps": 2, "trainer__log_every_n_steps": 1}
        samples = {"class_path": "noise.Noise", "init_args": {"seconds": 0.1}}
        args, whole = plain(**settings, trainer__callbacks=[samples])
        run = zygote.start(*args)
        assert run.wait() == 0, run.said()
        whole.rename(tmp_path / "whole")
        args += [f"--trainer.default_root_dir={disk / 'run'}"]
        run = zygote.start(*args)
        run.until((disk / "run" / "checkpoints" / "last.ckpt").exists)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1024))
        run.until(lambda: "cannot write" in run.said() and "last.ckpt" in run.said())
        run.until(lambda: "metrics.csv: No space" in run.said())
        filler.unlink()
        assert run.wait() == 0, run.said()
        assert complaints(run.said())
        shutil.copytree(disk / "run", tmp_path / "copy")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    found = [one for one in compare(tmp_path / "copy", tmp_path / "whole") if not one.startswith("tensorboard")]
    assert [one for one in found if "dirpath" not in one and "model_path" not in one] == []
