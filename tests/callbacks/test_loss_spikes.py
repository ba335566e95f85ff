"""A run that goes back ends as one that never had the data it skips."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from bimamba_lit.callbacks import BitFlips, LossSpikeGuard, Throughput
from bimamba_lit.errors import UserError
from bimamba_lit.training.csv_logger import CSVLogger
from bimamba_lit.training.last_checkpoint import LastCheckpoint
from bimamba_lit.training.resumed_logs import ResumedLogs

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

SETTINGS = {"window": 4, "sigmas": 20.0}


@pytest.fixture
def spiking(tiny: SimpleNamespace) -> Any:
    """Makes modules whose loss is large for batches that hold a token, and data that lacks given batches."""

    class Module(tiny.module):  # type: ignore[misc]
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.where(batch["spike"].any(), 100.0, 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Data(tiny.data):  # type: ignore[misc]
        def __init__(self, spikes: tuple[int, ...] = (), without: tuple[int, ...] = ()) -> None:
            super().__init__()
            self.spikes, self.without = spikes, without

        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            rows = [{**row, "spike": torch.tensor(i // 2 in self.spikes)} for i, row in enumerate(loader.dataset)]
            return type(loader)([row for i, row in enumerate(rows) if i // 2 not in self.without], batch_size=2)

    return SimpleNamespace(module=Module, data=Data)


def test_a_spike_is_above_the_mean_by_so_many_standard_deviations(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")

    def is_spike(*losses: float) -> bool:
        caplog.clear()
        guard = LossSpikeGuard(window=4, sigmas=3.0)
        strategy = SimpleNamespace(reduce=lambda loss, reduce_op: loss)
        trainer: Any = SimpleNamespace(global_step=0, strategy=strategy, checkpoint_callbacks=[])
        guard.on_train_start(trainer, trainer)
        for trainer.global_step, loss in enumerate(losses, 1):
            guard.on_before_backward(trainer, trainer, torch.tensor(loss))
            guard.on_train_batch_end(trainer, trainer)
        return f"step {len(losses)}: " in caplog.text

    before = [1.0, 3.0, 1.0, 3.0]  # mean 2, population's standard deviation 1
    assert is_spike(*before, 5.001) and not is_spike(*before, 4.999)
    assert not is_spike(*before[1:], 100.0), "nothing is a spike before the window is full"
    assert is_spike(9.0, *before, 5.001), "what left the window does not count"


class Stop(Exception):
    pass


class StopAt(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise Stop


def run(tiny: Any, spiking: Any, folder: Path, data: Any, *more: Any, resume: bool = False, **options: Any) -> Any:
    last = LastCheckpoint(folder, filename="last", every_n_train_steps=5, enable_version_counter=False)
    callbacks = [BitFlips(2), Throughput(1), ResumedLogs(), *more, last]
    trainer = tiny.trainer(
        folder, callbacks, logger=CSVLogger(folder), enable_checkpointing=True, **{"max_steps": 18, **options}
    )
    module = spiking.module()
    trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(("speed", "epoch"))} for row in csv.DictReader(file)]
    return SimpleNamespace(
        end=(
            module.state_dict(),
            trainer.optimizers[0].state_dict(),
            trainer.lr_scheduler_configs[0].scheduler._last_lr,
        ),
        rows=rows,
        trainer=trainer,
    )


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.end, other.end, rtol=0, atol=0)
    assert one.rows == other.rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rewind_is_a_run_without_the_data(
    tiny: Any, spiking: Any, tmp_path: Path, accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    # The spike is in step 12, and step 10 has a checkpoint: the batches of steps 11 and 12 are left out.
    at, first = 12 * accumulate - 1, 10 * accumulate
    options = {"accumulate_grad_batches": accumulate, "max_steps": 17}
    with caplog.at_level("INFO"):
        found = run(tiny, spiking, tmp_path / "a", spiking.data((at,)), LossSpikeGuard(**SETTINGS), **options)
    right = run(tiny, spiking, tmp_path / "b", spiking.data((), tuple(range(first, at + 1))), **options)
    assert found.trainer.global_step == 17
    assert [int(row["step"]) for row in found.rows] == list(range(17))
    assert_same(found, right)
    (told,) = [record.getMessage() for record in caplog.records if "LossSpikeGuard" in record.getMessage()]
    assert "step 12: the loss of" in told and "back to step 10, without the data since then (rewind 1 of 10)" in told
    throughput = next(one for one in found.trainer.callbacks if isinstance(one, Throughput))
    assert throughput.tokens_seen == (17 + 2) * accumulate * tiny.tokens_a_batch


def test_a_spike_right_after_the_checkpoint(tiny: Any, spiking: Any, tmp_path: Path) -> None:
    found = run(tiny, spiking, tmp_path / "a", spiking.data((10,)), LossSpikeGuard(**SETTINGS))
    assert_same(found, run(tiny, spiking, tmp_path / "b", spiking.data((), (10,))))


@pytest.mark.parametrize("stop", [13, 17, 18])
def test_killed_and_resumed_it_is_the_same_run(tiny: Any, spiking: Any, tmp_path: Path, stop: int) -> None:
    """Stopped between the rewind and the next checkpoint, right after that, and further on."""
    data = spiking.data((11,))
    whole = run(tiny, spiking, tmp_path / "whole", data, LossSpikeGuard(**SETTINGS))
    with pytest.raises(Stop):
        run(tiny, spiking, tmp_path / "killed", data, LossSpikeGuard(**SETTINGS), StopAt(stop))
    guard = LossSpikeGuard(**SETTINGS)
    assert_same(run(tiny, spiking, tmp_path / "killed", data, guard, resume=True), whole)
    assert guard.rewinds == 1


def test_rewinds_have_a_limit(tiny: Any, spiking: Any, tmp_path: Path) -> None:
    guard = LossSpikeGuard(max_rewinds=1, **SETTINGS)
    with pytest.raises(UserError, match=r"stopped after 1 rewinds: step 11: the loss of .* lower the learning rate"):
        run(tiny, spiking, tmp_path, spiking.data((11, 12)), guard)


def test_without_a_checkpoint_training_goes_on(
    tiny: Any, spiking: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer = tiny.trainer(tmp_path, [LossSpikeGuard(**SETTINGS)], max_steps=8)
        trainer.fit(spiking.module(), spiking.data((5,)))
    assert "there is no checkpoint yet to go back to" in caplog.text and trainer.global_step == 8


@pytest.mark.parametrize(
    ("settings", "told"), [({"window": 1}, "window is 1"), ({"sigmas": 0.0}, "sigmas"), ({"max_rewinds": -1}, "-1")]
)
def test_settings_out_of_range(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        LossSpikeGuard(**settings)
