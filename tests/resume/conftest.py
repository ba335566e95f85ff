"""Runs of the program that can be killed, the recipe they follow, and how two of them are compared."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

TESTS = Path(__file__).parent


@dataclass
class Run:
    """A process that runs a command."""

    zygote: "Zygote"
    pid: int
    output: Path

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        return int(self.zygote.ask({"wait": self.pid, "seconds": seconds}))

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def until(self, there: Any, seconds: float = 60) -> bool:
        """Wait for something to be true; False where the process ended before."""
        end = time.monotonic() + seconds
        while not there():
            if Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)
        return True


@dataclass
class Zygote:
    """Starts processes."""

    process: subprocess.Popen
    folder: Path
    path: list[str]
    started: int = 0

    def start(self, *args: object, fault: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> Run:
        self.started += 1
        output = self.folder / f"{self.started}.txt"
        told = {"args": [str(arg) for arg in args], "output": str(output), "path": self.path}
        return Run(self, int(self.ask(told | {"env": env or {}, "fault": fault})), output)

    def ask(self, told: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks at processes as Linux shows them")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "noise.py").write_text(NOISE)
    with subprocess.Popen(
        [sys.executable, str(TESTS / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Zygote(process, folder, [str(folder)])
        process.stdin.close()


NOISE = '''
"""Random numbers of every kind, that all end up in the weights; and a validation that draws, too."""

import multiprocessing
import os
import random
import signal
import time

import lightning.pytorch as pl
import numpy
import torch


class Noise(pl.Callback):
    def __init__(self, seconds: float = 0.0, validating: float = 0.0) -> None:
        self.seconds, self.validating = seconds, validating

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.fit_loop.total_batch_idx == int(os.environ.get("SIGNAL_IN_BATCH", "-1")):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        time.sleep(self.seconds)
        scale = 1 + 1e-4 * (random.random() + numpy.random.rand() + torch.rand(()).item())
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter *= scale

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        time.sleep(self.validating)
        torch.rand(())


class LosesAWorker(pl.Callback):
    """Kills a process that loads data, in code that makes an error of its own of any other, as ``inspect`` does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 6:
            try:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(60)
            except Exception as error:
                raise TypeError("unsupported callable") from error


class Uneven(pl.Callback):
    """Random numbers that every process has its own of, in the gradients that are averaged over all."""

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.lm.backbone.norm_f.register_forward_hook(lambda *_: _[-1] * self.factor)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        for _ in range(trainer.global_rank):
            torch.rand(()), random.random(), numpy.random.rand()
        self.factor = 1 + 1e-2 * (random.random() + numpy.random.rand() + torch.rand(()).item())
'''


@pytest.fixture(scope="session")
def recipe(tiny: Any) -> Any:
    """Writes a recipe that all kinds of state matter in, with settings changed, and returns its path."""

    def write(folder: Path, **changed: Any) -> Path:
        content = yaml.safe_load(tiny.distill_recipe.read_text())
        content["model"]["init_args"]["optimizer"]["total_steps"] = 40
        content["checkpoint"] = {"every_n_train_steps": 4}
        content["trainer"] |= {
            "default_root_dir": str(folder),
            "max_steps": 24,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 3,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "callbacks": [
                {"class_path": "noise.Noise"},
                {"class_path": "bimamba_lit.callbacks.BitFlips", "init_args": {"every_n_steps": 2}},
                {"class_path": "bimamba_lit.callbacks.WeightScales", "init_args": {"every_n_steps": 3}},
                {
                    "class_path": "bimamba_lit.callbacks.Samples",
                    "init_args": {"prompt": "The", "max_new_tokens": 4, "every_n_steps": 7},
                },
                {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1000}},
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(folder / "best"),
                        "monitor": "val/loss",
                        "filename": "best",
                        "enable_version_counter": False,  # what was saved and lost again is overwritten
                    },
                },
            ],
        }
        for key, value in changed.items():
            *path, last = key.split("__")
            place = content
            for name in path:
                place = place[name]
            place[last] = value
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two checkpoints, or parts of them, are not the same bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{where}/{i}")]
    return [] if one == other or one != one and other != other else [f"{where}: {one!r} and {other!r}"]


CLOCK = ("seconds", "speed/tokens_per_second")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in CLOCK]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    # Lightning adds the epoch to whatever it logs, twice in a step that it logs and validates.
    return found | {"epoch": sorted(set(found["epoch"]))}


def unequal(one: Path, other: Path) -> list[str]:
    """Return in what two finished runs differ, their clocks aside."""
    checkpoints, summaries = [], []
    for folder in (one, other):
        found = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        found["callbacks"]["Throughput"].pop("seconds")
        found["callbacks"]["ResumedLogs"]["row"].pop("speed/tokens_per_second", None)
        checkpoints.append(found)
        for state in found["callbacks"].values():
            state.pop("current_score", None)  # Lightning's ModelCheckpoint saves it and does not take it back
        summaries.append(json.loads((folder / "summary.json").read_text()))
        assert summaries[-1].pop("seconds") > 0
    told = differences(*checkpoints, "last.ckpt") + differences(*summaries, "summary.json")
    told += differences(rows(one), rows(other), "metrics.csv")
    told += differences(scalars(one), scalars(other), "tensorboard")
    samples = [folder / "samples.md" for folder in (one, other)]
    return told + differences(*(file.read_text() if file.exists() else "" for file in samples), "samples.md")


@pytest.fixture(scope="session")
def compare() -> Any:
    return unequal
