import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from bimamba_lit.callbacks import Throughput

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Clock:
    """Stands for ``perf_counter``: it moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Passing(pl.Callback):
    """Lets time pass: a second in every batch, a thousand in validation and in writing a checkpoint."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, *_: Any) -> None:
        self.clock.now += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.clock.now += 1000

    def on_save_checkpoint(self, *_: Any) -> None:
        self.clock.now += 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("bimamba_lit.callbacks.throughput.perf_counter", clock)
    return clock


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rate_and_totals(tiny: SimpleNamespace, tmp_path: Path, clock: Clock, accumulate: int) -> None:
    speed = Throughput(4)
    trainer = tiny.trainer(tmp_path, [speed, Passing(clock)], max_steps=9, accumulate_grad_batches=accumulate)
    trainer.fit(tiny.module(), tiny.data())
    # The wait between batches takes no time here, so a batch takes one second.
    assert speed.tokens_seen == 9 * accumulate * tiny.tokens_a_batch
    assert speed.seconds == 9 * accumulate
    assert trainer.callback_metrics["speed/tokens_per_second"] == tiny.tokens_a_batch
    assert trainer.callback_metrics["speed/tokens_seen"] == 8 * accumulate * tiny.tokens_a_batch


def test_the_wait_for_data_counts(tiny: SimpleNamespace, tmp_path: Path, clock: Clock) -> None:
    class SlowData(tiny.data):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            for batch in super().train_dataloader():
                clock.now += 10
                yield batch

    speed = Throughput(5)
    # Lightning fetches one batch ahead: before the first batch two waits pass, and they come before the clock starts.
    tiny.trainer(tmp_path, [speed, Passing(clock)], max_steps=5).fit(tiny.module(), SlowData())
    assert speed.seconds == 5 + 4 * 10


def test_validation_and_checkpoints_do_not_count(tiny: SimpleNamespace, tmp_path: Path, clock: Clock) -> None:
    speed = Throughput(6)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer = tiny.trainer(
        tmp_path,
        [speed, Passing(clock), checkpoints],
        max_steps=6,
        enable_checkpointing=True,
        limit_val_batches=2,
        val_check_interval=3,
    )
    trainer.fit(tiny.module(), tiny.data())
    assert clock.now > 100 + 5000
    assert speed.seconds == 6
    assert trainer.callback_metrics["speed/tokens_per_second"] == tiny.tokens_a_batch


def test_totals_go_on_after_a_resume(tiny: SimpleNamespace, tmp_path: Path, clock: Clock) -> None:
    trainer = tiny.trainer(tmp_path, [Throughput(2), Passing(clock)], max_steps=3)
    trainer.fit(tiny.module(), tiny.data())
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    state = torch.load(tmp_path / "at3.ckpt", weights_only=True)["callbacks"]["Throughput"]
    assert state == {"tokens_seen": 3 * tiny.tokens_a_batch, "seconds": 3.0}
    speed = Throughput(2)
    trainer = tiny.trainer(tmp_path, [speed, Passing(clock)], max_steps=7)
    trainer.fit(tiny.module(), tiny.data(), ckpt_path=tmp_path / "at3.ckpt", weights_only=True)
    assert speed.tokens_seen == 7 * tiny.tokens_a_batch
    assert speed.seconds == 7
    # The first interval after the resume has one step, not two with the tokens of three before it.
    assert trainer.callback_metrics["speed/tokens_per_second"] == tiny.tokens_a_batch


def test_the_real_clock_runs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    speed = Throughput(1)
    begun = time.perf_counter()
    tiny.trainer(tmp_path, [speed], max_steps=3).fit(tiny.module(), tiny.data())
    assert 0 < speed.seconds < time.perf_counter() - begun
