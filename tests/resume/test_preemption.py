"""A signal saves what there is and ends with 75, whenever it comes; a second one ends at once."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

RESUMABLE = 75
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def steps(folder: Path) -> int:
    """Return how many steps are logged."""
    file = folder / "metrics.csv"
    if not file.exists():
        return 0
    lines = list(csv.reader(file.read_text().splitlines()))[1:]
    return int(lines[-1][0]) + 1 if lines else 0


def saved(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.fixture
def slow(recipe: Any, tmp_path: Path) -> Any:
    """Returns the command of a run that takes its time for batches, and its folder."""

    def write(seconds: float = 0.05, **changed: Any) -> tuple[list[str], Path]:
        folder = tmp_path / "run"
        noise = {"class_path": "noise.Noise", "init_args": {"seconds": seconds, "validating": 10 * seconds}}
        default = {"trainer__log_every_n_steps": 1, "checkpoint__every_n_train_steps": 1000}
        path = recipe(folder, **default | {"trainer__callbacks": [noise], "trainer__max_steps": 1000} | changed)
        return ["fit", "-c", str(path)], folder

    return write


def test_in_training_it_ends_after_the_step_and_its_command_goes_on(zygote: Any, slow: Any) -> None:
    args, folder = slow(data__init_args__workers=2)
    run = zygote.start(*args)
    run.until(lambda: steps(folder) >= 2)
    run.send(signal.SIGTERM, group=True)  # the workers too, as Slurm does
    run.send(signal.SIGTERM)  # and this process once more, as `timeout` does
    assert run.wait() == RESUMABLE, run.said()
    step = saved(folder)
    told = run.said().splitlines()[-1]
    assert told.startswith(f"bimamba: interrupted by SIGTERM, step {step} is saved; go on with: bimamba fit -c ")
    assert told.endswith(" --ckpt_path last") and "Traceback" not in run.said()
    assert steps(folder) == step and not (folder / "summary.json").exists()

    again = zygote.start(*told.partition("go on with: bimamba ")[2].split())
    again.until(lambda: steps(folder) >= step + 2)
    again.send(signal.SIGINT, group=True)  # Ctrl-C
    assert again.wait() == RESUMABLE, again.said()
    assert "interrupted by SIGINT" in again.said() and saved(folder) >= step + 2


def test_a_second_signal_ends_at_once(zygote: Any, slow: Any) -> None:
    args, folder = slow(seconds=30.0, data__init_args__workers=2, trainer__num_sanity_val_steps=0)
    run = zygote.start(*args)
    run.until(lambda: "parameters" in run.said() and (folder / "config.yaml").exists())
    time.sleep(1.0)
    run.send(signal.SIGTERM)
    run.until(lambda: "stopping after this step" in run.said())
    time.sleep(1.1)
    begun = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == RESUMABLE and time.monotonic() - begun < 5, run.said()
    assert "stopped at once" in run.said() and not (folder / "checkpoints").exists()


def test_within_a_validation_it_ends_between_two_batches(zygote: Any, slow: Any) -> None:
    args, folder = slow(
        trainer__val_check_interval=6, trainer__accumulate_grad_batches=1, trainer__num_sanity_val_steps=0
    )
    run = zygote.start(*args)
    run.until(lambda: steps(folder) >= 6)
    time.sleep(0.3)
    run.send(signal.SIGTERM)
    assert run.wait() == RESUMABLE, run.said()
    assert "step 6 is saved" in run.said() and saved(folder) == 6


@pytest.mark.slow
def test_slurms_signal_saves_where_lightning_would_requeue(zygote: Any, slow: Any) -> None:
    args, folder = slow()
    run = zygote.start(*args, env=SLURM)
    run.until(lambda: steps(folder) >= 1)
    run.send(signal.SIGUSR1)
    assert run.wait() == RESUMABLE, run.said()
    assert "interrupted by SIGUSR1" in run.said() and "requeu" not in run.said() and saved(folder) >= 1
    assert not list(folder.glob("hpc_ckpt*"))


@pytest.mark.parametrize("when", ["the teacher loads", pytest.param("the sanity check", marks=pytest.mark.slow)])
def test_before_there_is_anything_to_save_it_ends_at_once(zygote: Any, slow: Any, when: str) -> None:
    args, folder = slow(seconds=30.0)
    env = {"PAUSE": "1"} if when == "the teacher loads" else {}
    run = zygote.start(*args, env=env)
    run.until(lambda: ("pausing" if env else "parameters") in run.said())
    time.sleep(0.2)
    run.send(signal.SIGTERM)
    assert run.wait(10) == RESUMABLE, run.said()
    told = run.said().splitlines()[-1]
    assert told == f"bimamba: interrupted by SIGTERM; go on with: bimamba {' '.join(args)}"
    assert not (folder / "checkpoints").exists()


def takes(pid: int, number: int) -> bool:
    """Say whether a process has a handler for a signal."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_while_it_imports_it_ends_resumable_too(tiny: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bimamba_lit", "fit", "-c", str(tiny.teacher_recipe)]
    command.append(f"--trainer.default_root_dir={tmp_path / 'run'}")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not takes(process.pid, signal.SIGTERM):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == RESUMABLE and told.startswith("bimamba: interrupted by SIGTERM; go on with: "), told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_ablation_stops_with_its_run(zygote: Any, slow: Any, tmp_path: Path) -> None:
    args, _ = slow()
    grid = tmp_path / "grid.yaml"
    grid.write_text("model.binarizer: [FBI, Sign]")
    out = tmp_path / "out"
    env = {"PYTHONPATH": os.pathsep.join([*zygote.path, os.environ.get("PYTHONPATH", "")])}
    run = zygote.start("ablate", "-c", args[-1], "--grid", grid, "--out", out, env=env)
    run.until(lambda: any(steps(folder) >= 1 for folder in out.glob("*FBI*")))
    run.send(signal.SIGINT, group=True)
    assert run.wait() == RESUMABLE, run.said()
    (folder,) = out.glob("*FBI*")
    assert saved(folder) >= 1 and not list(out.glob("*Sign*"))
    assert "go on with: bimamba ablate" in run.said().splitlines()[-1]
    shutil.rmtree(out)
