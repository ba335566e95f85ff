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
    """Lets time pass: in every batch, and a thousand seconds in validation and in writing a checkpoint.

    A batch takes a second, and ``slowdown`` times that from step 4 on.
    """

    def __init__(self, clock: Clock, slowdown: float = 1) -> None:
        self.clock, self.slowdown = clock, slowdown

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self.clock.now += 1 if trainer.global_step < 4 else self.slowdown

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
    trainer = tiny.trainer(
        tmp_path, [speed, Passing(clock, slowdown=4)], max_steps=9, accumulate_grad_batches=accumulate
    )
    trainer.fit(tiny.module(), tiny.data())
    # The wait between batches takes no time here, so a batch takes its time alone.
    assert speed.tokens_seen == 9 * accumulate * tiny.tokens_a_batch
    assert speed.seconds == (4 + 5 * 4) * accumulate
    # The last log is over steps 5 to 8.
    assert trainer.callback_metrics["speed/tokens_per_second"] == tiny.tokens_a_batch / 4
    assert trainer.callback_metrics["speed/tokens_seen"] == 8 * accumulate * tiny.tokens_a_batch


def test_tokens_are_those_of_all_devices() -> None:
    speed = Throughput(1)
    trainer = SimpleNamespace(world_size=3, global_step=0, loggers=[])
    for _ in range(2):
        speed.on_train_batch_end(trainer, None, None, {"input_ids": torch.zeros(4, 8)}, 0)  # type: ignore[arg-type]
    assert speed.tokens_seen == 2 * 3 * 4 * 8


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
    speed = Throughput(6)
    trainer = tiny.trainer(tmp_path, [speed, Passing(clock, slowdown=4)], max_steps=6)
    trainer.fit(tiny.module(), tiny.data(), ckpt_path=tmp_path / "at3.ckpt", weights_only=True)
    assert speed.tokens_seen == 6 * tiny.tokens_a_batch
    assert speed.seconds == 3 + 1 + 4 + 4
    # The first interval begins at the resume: three steps in nine seconds.
    assert trainer.callback_metrics["speed/tokens_per_second"].item() == pytest.approx(tiny.tokens_a_batch * 3 / 9)


def test_the_real_clock_runs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    speed = Throughput(1)
    begun = time.perf_counter()
    tiny.trainer(tmp_path, [speed], max_steps=3).fit(tiny.module(), tiny.data())
    assert 0 < speed.seconds < time.perf_counter() - begun
