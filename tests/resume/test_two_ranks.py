"""Two processes of a run, both or one of them told to stop, stop after the same step and go on as if they had not."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bimamba_lit.models import MambaLM

RESUMABLE = 75
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


def by_torchrun(rank: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a process."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }


def by_slurm(rank: int, port: int) -> dict[str, str]:
    """Return what Slurm tells a process."""
    ranks = {"JOB_ID": 1, "NTASKS": 2, "NTASKS_PER_NODE": 2, "PROCID": rank, "LOCALID": rank, "NODEID": 0}
    return {f"SLURM_{name}": str(value) for name, value in ranks.items()} | {
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


Environment = Callable[[int, int], dict[str, str]]


def start(zygote: Any, args: list[str], environment: Environment = by_torchrun, **more: str) -> list[Any]:
    """Start the two processes of a command."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    return [zygote.start(*args, env=environment(rank, port) | more) for rank in (0, 1)]


def end(runs: list[Any], codes: list[int]) -> list[str]:
    """Wait for processes to exit with ``codes``, and return what they said."""
    found = [run.wait(60) for run in runs]
    said = [run.said() for run in runs]
    assert found == codes and "Traceback" not in "".join(said), "\n".join(said)
    return said


def saved(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.fixture(scope="module")
def ours(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the command of a run by two processes, and its folder."""

    def write(seconds: float = 0.0, **changed: Any) -> tuple[list[str], Path]:
        folder = tmp_path_factory.mktemp("two") / "run"
        noise = {"class_path": "noise.Noise", "init_args": {"seconds": seconds, "validating": seconds}}
        watch = {"class_path": "bimamba_lit.callbacks.BitFlips", "init_args": {"every_n_steps": 2}}
        uneven = {"class_path": "noise.Uneven"}
        settings = {
            "trainer__devices": 2,
            "trainer__strategy": "ddp",
            "trainer__max_steps": 8,
            "trainer__log_every_n_steps": 1,
            "trainer__num_sanity_val_steps": 0,
            "trainer__callbacks": [noise, watch] if seconds else [watch, uneven],
            "data__init_args__batch_size": 2,
            "checkpoint": {"every_n_train_steps": 2},
        }
        return ["fit", "-c", str(recipe(folder, **settings | changed)), "--ckpt_path", "last"], folder

    return write


@pytest.fixture(scope="module")
def whole(zygote: Any, ours: Any) -> tuple[list[str], Path, Path]:
    """A command, its folder, and where an undisturbed run of it lies."""
    args, folder = ours()
    end(start(zygote, args), [0, 0])
    return args, folder, folder.rename(folder.parent / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "told"),
    [(by_torchrun, [0, 1]), (by_torchrun, [0]), (by_torchrun, [1]), (by_slurm, [0, 1]), (by_slurm, [1])],
)
def test_they_stop_after_one_step_and_end_as_if_they_had_not(
    zygote: Any, compare: Any, whole: Any, environment: Environment, told: list[int]
) -> None:
    args, folder, undisturbed = whole
    runs = start(zygote, args, environment)
    runs[0].until((folder / "checkpoints" / "last.ckpt").exists)
    for rank in told:
        runs[rank].send(signal.SIGTERM)
    said = end(runs, [RESUMABLE, RESUMABLE])
    step = saved(folder)
    program = "torchrun ... -m bimamba_lit" if environment is by_torchrun else "bimamba"
    assert 2 <= step < 8 and f"step {step} is saved; go on with: {program} fit -c " in said[0]
    assert "go on with" not in said[1] and ("interrupted by SIGTERM" in said[0]) == (0 in told)
    end(start(zygote, args, environment), [0, 0])
    found = compare(folder, undisturbed)
    shutil.rmtree(folder)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_what_is_sharded_stops_and_goes_on_likewise(zygote: Any, ours: Any) -> None:
    args, folder = ours(trainer__strategy=SHARDED)
    end(start(zygote, args), [0, 0])
    undisturbed = folder.rename(folder.parent / "whole")
    runs = start(zygote, args)
    runs[0].until((folder / "checkpoints" / "last.ckpt").exists)
    runs[1].send(signal.SIGTERM)
    assert "is saved; go on with" in end(runs, [RESUMABLE, RESUMABLE])[0]
    end(start(zygote, args), [0, 0])
    weights = [MambaLM.from_pretrained(run / "checkpoints" / "last.ckpt").state_dict() for run in (folder, undisturbed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    logs = [(run / "metrics.csv").read_text().splitlines() for run in (folder, undisturbed)]
    assert len(logs[0]) == len(logs[1])


@pytest.mark.slow
@pytest.mark.parametrize("full", [[0, 1], [1]])
def test_a_disk_that_is_full_for_one_costs_a_checkpoint_that_is_sharded(
    zygote: Any, ours: Any, full: list[int]
) -> None:
    args, folder = ours(trainer__strategy=SHARDED, seconds=0.1)
    runs = start(zygote, args)
    runs[0].until((folder / "checkpoints" / "last.ckpt").exists)
    limits = resource.prlimit(runs[0].pid, resource.RLIMIT_FSIZE)
    for rank in full:  # a process has no space for files of more than 30,000 bytes
        resource.prlimit(runs[rank].pid, resource.RLIMIT_FSIZE, (30_000, limits[1]))
    runs[0].until(lambda: "cannot write" in runs[0].said())
    for rank in full:
        resource.prlimit(runs[rank].pid, resource.RLIMIT_FSIZE, limits)
    said = end(runs, [0, 0])
    (told,) = {line for line in said[0].splitlines() if line.startswith("bimamba: ")}
    assert told.startswith(f"bimamba: cannot write {folder}/checkpoints/last.ckpt: ") and "bimamba: " not in said[1]
    assert told.endswith("; the last checkpoint stays and training goes on") and ("disk" in told or "large" in told)
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last / "meta.pt", weights_only=True)["global_step"] == 8 and MambaLM.from_pretrained(last)
    assert len(list(last.parent.iterdir())) == 2


@pytest.mark.parametrize("later", [0.3, *(pytest.param(later, marks=pytest.mark.slow) for later in (0.0, 0.1, 0.6))])
def test_a_process_told_later_than_the_other_exits_no_other_way(zygote: Any, ours: Any, later: float) -> None:
    args, folder = ours(seconds=0.01)
    runs = start(zygote, args)
    runs[0].until((folder / "checkpoints" / "last.ckpt").exists)
    runs[1].send(signal.SIGTERM)
    time.sleep(later)
    runs[0].send(signal.SIGTERM)
    told = end(runs, [RESUMABLE, RESUMABLE])[0]
    assert f"step {saved(folder)} is saved" in told


@pytest.mark.slow
def test_within_a_validation_they_stop_together(zygote: Any, ours: Any) -> None:
    args, folder = ours(seconds=0.2, trainer__val_check_interval=4, trainer__accumulate_grad_batches=1)
    runs = start(zygote, args)
    runs[0].until(lambda: "step 4/8  train/loss" in runs[0].said())
    time.sleep(0.3)
    runs[1].send(signal.SIGTERM)
    assert "step 4 is saved" in end(runs, [RESUMABLE, RESUMABLE])[0] and saved(folder) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_loses_the_other_does_not_hang_and_says_so(zygote: Any, ours: Any, number: int) -> None:
    """Where nothing can be agreed on: before the first step, or where a process is killed."""
    args, folder = ours(seconds=0.4, trainer__num_sanity_val_steps=2)
    runs = start(zygote, args)
    runs[0].until(lambda: ("step 2/8" if number == signal.SIGKILL else "parameters") in runs[0].said())
    time.sleep(0.3)
    runs[1].send(number)
    said = end(runs, [1, RESUMABLE if number == signal.SIGTERM else -number])
    (told,) = [line for line in said[0].splitlines() if line.startswith("bimamba: ")]
    assert "another process of the run ended" in told and told.endswith("go on from there with --ckpt_path last")
    assert (folder / "checkpoints").exists() == (number == signal.SIGKILL)


STARTED = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bimamba_lit"],
    "Lightning": ["-m", "bimamba_lit"],
}


@pytest.mark.slow
@pytest.mark.parametrize("by", list(STARTED))
@pytest.mark.parametrize("group", [False, True])
def test_what_starts_them_may_be_told(zygote: Any, ours: Any, by: str, group: bool) -> None:
    """torchrun hands the signal on and exits with a code of its own; Lightning's first process is the run's."""
    args, folder = ours(seconds=0.05)
    found = os.pathsep.join([*zygote.path, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *STARTED[by], *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == (1 if by == "torchrun" else RESUMABLE), told
    assert f"step {saved(folder)} is saved; go on with: " in told
