"""What a person sees while a run goes on, in a terminal and in a log."""

import lightning.pytorch as pl
import pytest
import torch

from bimamba_lit.callbacks import ProgressLines, StepsBar


class OneWeight(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        loss = (self.weight * batch).square().sum()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.weight.square().sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback, folder, **limits):
    data = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[callback],
        enable_progress_bar=isinstance(callback, StepsBar), default_root_dir=folder, num_sanity_val_steps=0, **limits,
    )  # fmt: skip
    trainer.fit(OneWeight(), data, data)


def test_lines_come_every_few_steps_and_after_validation(tmp_path, capsys):
    fit(ProgressLines(3), tmp_path, max_steps=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["3/8", "6/8", "8/8"]
    assert "train/loss 0.4096" in lines[0] and "val/loss" in lines[2]


def test_a_validation_by_itself_tells_of_no_step(tmp_path, capsys):
    data = torch.utils.data.DataLoader(torch.ones(2, 1), batch_size=1)
    pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[ProgressLines(3)], enable_progress_bar=False, max_steps=8,
        default_root_dir=tmp_path,
    ).validate(OneWeight(), data, verbose=False)  # fmt: skip
    assert "val/loss 1\n" in (out := capsys.readouterr().out) and "step" not in out


@pytest.mark.parametrize(("limits", "shown"), [({"max_steps": 4}, "Epoch 0 "), ({"max_epochs": 1}, "Epoch 0/0")])
def test_the_bar_names_no_epoch_that_is_not_there(tmp_path, capsys, limits, shown):
    fit(StepsBar(), tmp_path, **limits)
    out = capsys.readouterr().out
    assert shown in out and "/-2" not in out
