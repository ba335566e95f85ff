import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from bimamba_lit.binarize import FBI
from bimamba_lit.callbacks import BitFlips
from bimamba_lit.callbacks.bit_flips import count_flips
from bimamba_lit.errors import UserError
from bimamba_lit.ops import pack_signs
from bimamba_lit.training.csv_logger import CSVLogger

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

IN, OUT = "backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"


class Signs(pl.Callback):
    """Keeps the unpacked signs of every layer after every step: the definition of what has to be logged."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def _keep(self, trainer: pl.Trainer, module: Any) -> None:
        layers = {n: m for n, m in module.lm.named_modules() if isinstance(m, FBI)}
        self.seen[trainer.global_step] = {name: (layer.latent > 0).clone() for name, layer in layers.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._keep(trainer, pl_module)


class Logged(pl.Callback):
    """Keeps what ``trainer.callback_metrics`` and the progress bar hold after every batch."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float], dict[str, float]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append((trainer.global_step, metrics, dict(trainer.progress_bar_metrics)))


def expected(signs: dict[int, dict[str, Tensor]], now: int, before: int) -> dict[str, float]:
    changed = {name: signs[now][name] != signs[before][name] for name in signs[now]}
    rates = {name: c.float().mean().item() for name, c in changed.items()}
    return {"": torch.cat([c.flatten() for c in changed.values()]).float().mean().item(), **rates}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_logged_rates_are_those_of_the_unpacked_signs(
    tiny: SimpleNamespace, tmp_path: Path, accumulate: int
) -> None:
    signs = Signs()
    logger = CSVLogger(tmp_path)
    trainer = tiny.trainer(
        tmp_path, [signs, BitFlips(3)], max_steps=9, logger=logger, accumulate_grad_batches=accumulate
    )
    trainer.fit(tiny.module(), tiny.data())
    rows = [row for row in rows_of(tmp_path / "metrics.csv") if row["flips/rate"]]
    assert [int(row["step"]) for row in rows] == [2, 5, 8]
    for row in rows:
        now = int(row["step"]) + 1
        for metric, before in (("flips/rate", now - 3), ("flips/since_start", 0)):
            for name, rate in expected(signs.seen, now, before).items():
                assert float(row[f"{metric}/{name}".rstrip("/")]) == pytest.approx(rate, abs=1e-6)
    assert any(0 < float(row["flips/rate"]) < 1 for row in rows)
    assert {f"flips/rate/{IN}", f"flips/rate/{OUT}"} <= set(rows[0])


def test_every_value_reaches_the_loggers_once_whatever_lightning_logs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [BitFlips(2)], max_steps=6, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    trainer.fit(tiny.module(), tiny.data())
    rows = rows_of(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["flips/rate"]] == [1, 3, 5]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 5]


def test_the_rate_is_in_the_progress_bar(tiny: SimpleNamespace, tmp_path: Path) -> None:
    logged = Logged()
    tiny.trainer(tmp_path, [BitFlips(1), logged], max_steps=3).fit(tiny.module(), tiny.data())
    # What one callback logs is in the metrics once the batch has ended, so after the next one.
    step, metrics, bar = logged.rows[-1]
    assert step == 3
    assert {"flips/rate", "flips/since_start", f"flips/rate/{IN}"} <= set(metrics)
    assert set(bar) == {"flips/rate"}


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def run(folder: str, steps: int, ckpt: Path | None = None) -> pl.Trainer:
        trainer = tiny.trainer(tmp_path / folder, [BitFlips(4)], max_steps=steps, logger=CSVLogger(tmp_path / folder))
        trainer.fit(tiny.module(), tiny.data(), ckpt_path=ckpt, weights_only=True)
        return trainer

    run("whole", 12)

    class SaveAt6(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "at6.ckpt")

    trainer = tiny.trainer(tmp_path / "cut", [BitFlips(4), SaveAt6()], max_steps=7, logger=CSVLogger(tmp_path / "cut"))
    trainer.fit(tiny.module(), tiny.data())
    run("cut", 12, tmp_path / "at6.ckpt")
    assert rows_of(tmp_path / "cut" / "metrics.csv") == rows_of(tmp_path / "whole" / "metrics.csv")


def test_the_checkpoint_holds_packed_bits(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [BitFlips(2)], max_steps=3)
    module = tiny.module()
    trainer.fit(module, tiny.data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["BitFlips"]
    for snapshots in (state["start"], state["last"]):
        assert set(snapshots) == {IN, OUT}
        assert snapshots[IN].dtype == torch.uint8
        assert snapshots[IN].shape == (module.lm.get_submodule(IN).out_features, 2)


def test_padding_bits_never_count() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 7, 8, 13):
        before, after = torch.randn(2, 5, width, generator=generator)
        counted = int(count_flips(pack_signs(before), pack_signs(after)))
        assert counted == int(((before > 0) != (after > 0)).sum())
    assert int(count_flips(pack_signs(torch.ones(5, 13)), pack_signs(-torch.ones(5, 13)))) == 65


def test_a_model_without_binary_layers_is_told_once_and_left_alone(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged = Logged()
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, [BitFlips(1), logged], max_steps=3).fit(tiny.module(scheme=None), tiny.data())
    assert sum("no binary layer" in message for message in caplog.messages) == 1
    assert not any(name.startswith("flips") for name in logged.rows[-1][1])


def test_a_step_count_under_one_is_refused() -> None:
    with pytest.raises(UserError, match="BitFlips: every_n_steps is 0"):
        BitFlips(0)


class Thaw(pl.Callback):
    """Freezes the signs of out_proj for a while, by taking its gradients away."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step < self.until:
            pl_module.lm.get_parameter(f"{OUT}.latent").grad = None


def test_a_layer_whose_signs_froze_is_told_of_once(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flips = BitFlips(2, frozen_after=6)
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, [Thaw(until=99), flips], max_steps=9).fit(tiny.module(lr=0.2), tiny.data())
        told = [record.getMessage() for record in caplog.records if "has changed" in record.getMessage()]
        assert told == [f"BitFlips: step 6: no sign of {OUT} has changed for 6 steps"]
        caplog.clear()
        resumed = BitFlips(2, frozen_after=6)
        resumed.load_state_dict(flips.state_dict())
        tiny.trainer(tmp_path, [Thaw(until=99), resumed], max_steps=9).fit(tiny.module(lr=0.2), tiny.data())
        tiny.trainer(tmp_path, [Thaw(until=4), BitFlips(2, 6)], max_steps=9).fit(tiny.module(lr=0.2), tiny.data())
        tiny.trainer(tmp_path, [Thaw(until=99), BitFlips(2, 0)], max_steps=9).fit(tiny.module(lr=0.2), tiny.data())
        assert "has changed" not in caplog.text
    flips = BitFlips(2, frozen_after=6)
    for count in (0, 0, 1, 0, 0):  # a flip in between begins the count anew
        flips._tell_frozen(SimpleNamespace(global_step=9), {OUT: count})  # type: ignore[arg-type]
    assert flips.state_dict()["still"] == {OUT: 4}
    with pytest.raises(UserError, match="frozen_after is -1"):
        BitFlips(frozen_after=-1)
