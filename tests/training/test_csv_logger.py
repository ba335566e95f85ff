import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from bimamba_lit.errors import UserError
from bimamba_lit.training.csv_logger import CSVLogger, MetricsFile
from bimamba_lit.training.resumed_logs import ResumedLogs

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters({"width": 2})
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return StatefulDataLoader(torch.randn(40, 2, generator=torch.Generator().manual_seed(1)), batch_size=2)

    def val_dataloader(self) -> Any:
        return StatefulDataLoader(torch.ones(2, 2), batch_size=2)


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    """Ends the run at the start of the batch after a step, as a kill would, or leaves it alone."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def run(folder: Path, kill: int | None = None, ckpt: Path | None = None, every: int = 5, **options: Any) -> pl.Trainer:
    """Train 12 steps with a log every second, validation every fourth and a checkpoint every fifth or ``every``."""
    defaults: dict[str, Any] = {
        "max_steps": 12,
        "log_every_n_steps": 2,
        "val_check_interval": 4,
        "callbacks": [
            ResumedLogs(),
            KillAt(kill),
            pl.callbacks.ModelCheckpoint(
                folder / "checkpoints", every_n_train_steps=every, save_top_k=-1, filename="{step}"
            ),
        ],
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **{**defaults, **options},
    )
    if kill is None:
        trainer.fit(Linear(), ckpt_path=ckpt, weights_only=True)
    else:
        with pytest.raises(Killed):
            trainer.fit(Linear(), ckpt_path=ckpt, weights_only=True)
    return trainer


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_step_in_the_run_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["1", "3", "5", "7", "9", "11"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["3", "7", "11"]
    assert all(row["train/loss"] and row["epoch"] == "0" for row in rows)
    assert float(rows[-1]["train/loss"]) == trainer.callback_metrics["train/loss"].item()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "checkpoints"}
    assert Path(trainer.log_dir or "") == tmp_path
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=5.ckpt", "step=10.ckpt"}


@pytest.mark.parametrize(("every", "kill"), [(5, 6), (5, 8), (5, 9), (4, 5), (4, 7)])
def test_a_killed_and_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path, every: int, kill: int) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "cut", kill, every=every)
    assert int(rows_of(tmp_path / "cut")[-1]["step"]) >= every - 1
    run(tmp_path / "cut", ckpt=tmp_path / "cut" / "checkpoints" / f"step={every}.ckpt", every=every)
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_a_run_killed_before_its_first_log_after_the_resume_can_be_resumed_again(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "cut", 9)
    checkpoint = tmp_path / "cut" / "checkpoints" / "step=5.ckpt"
    run(tmp_path / "cut", 5, checkpoint)
    assert [row["step"] for row in rows_of(tmp_path / "cut")] == ["1", "3"]
    run(tmp_path / "cut", ckpt=checkpoint)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_fresh_run_starts_the_file_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("not,of,this,kind\n1,2,3,4\n")
    run(tmp_path, max_steps=2)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1"]
    run(tmp_path, max_steps=4)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "3"]


def test_validate_leaves_the_file_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=CSVLogger(tmp_path), enable_progress_bar=False
    )
    trainer.validate(Linear(), verbose=False)
    assert trainer.callback_metrics["val/loss"] > 0
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_resume_of_something_else_is_told_in_a_sentence(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "metrics.csv").write_text("loss\n0.5\n")
    with pytest.raises(UserError, match="rows without a step number"):
        run(tmp_path, ckpt=tmp_path / "checkpoints" / "step=5.ckpt")
    assert (tmp_path / "metrics.csv").read_text() == "loss\n0.5\n"


def test_columns_grow_and_values_are_exact(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.csv")
    file.begin(0)
    file.write(0, {"a": 0.1})
    file.write(1, {"a": 1 / 3})
    file.write(1, {"b": torch.tensor(2.5)})
    file.write(2, {"b": float("nan")})
    file.write(2, {"a": 123.4567})
    file.write(2, {"a": 8.25})
    assert file.path.read_text() == f"step,a,b\n0,0.1,\n1,{1 / 3!r},2.5\n2,8.25,nan\n"


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n0,1.0\n1,2.0\n2,3.")
    file = MetricsFile(path)
    file.begin(3)
    file.write(3, {"a": 4.0})
    assert path.read_text() == "step,a\n0,1.0\n1,2.0\n3,4.0\n"


def test_what_comes_late_for_the_last_row_joins_it_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n0,1.0,\n1,2.0,\n2,3.0,9.0\n")
    file = MetricsFile(path)
    file.begin(2)
    file.write(1, {"b": 5.0})
    file.write(2, {"c": 6.0})
    assert path.read_text() == "step,a,b,c\n0,1.0,,\n1,2.0,5.0,\n2,,,6.0\n"


def test_without_a_trainer_it_appends(tmp_path: Path) -> None:
    CSVLogger(tmp_path).log_metrics({"a": 1.0}, step=4)
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 2.0})
    logger.log_metrics({"b": 3.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n4,1.0,\n5,2.0,\n6,,3.0\n"


@pytest.mark.parametrize("way", ["appended", "with a new column"])
def test_rows_that_cannot_be_written_are_kept_and_written_later(tmp_path: Path, way: str, capsys: Any) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.write(0, {"a": 1.0, "b": 1.5})
    whole = file.path.rename(tmp_path / "aside")
    file.path.mkdir()
    file.write(1, {"a": 2.0} if way == "appended" else {"c": 2.0})
    file.write(1, {"b": 2.5})
    file.write(2, {"a": 3.0})
    with pytest.raises(UserError, match=r"cannot .*metrics\.csv"):
        file.sync()
    assert capsys.readouterr().err.count("cannot ") == 1
    file.path.rmdir()
    whole.rename(file.path)
    file.write(2, {"b": 3.5})
    file.write(3, {"a": 4.0})
    file.sync()
    columns, first = ("a,b", "2.0,2.5") if way == "appended" else ("a,b,c", ",2.5,2.0")
    more = "" if way == "appended" else ","
    rows = f"0,1.0,1.5{more}\n1,{first}\n2,3.0,3.5{more}\n3,4.0,{more}\n"
    assert file.path.read_text() == f"step,{columns}\n{rows}"
