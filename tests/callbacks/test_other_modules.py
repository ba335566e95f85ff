"""Callbacks on a LightningModule of the user's own, whose model has no name that they could know."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from bimamba_lit.binarize import FBI, binarize_
from bimamba_lit.callbacks import AnnealedGradient, BitFlips, Progressive, WeightScales

# torchdata's loader calls torch.set_vital.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Own(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
        binarize_(self.net, lambda linear: FBI(linear, straight_through="tanh", reach=1.0), targets="*")

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"].float()).square().mean()

    def validation_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_layers_are_found_and_named_within_the_module(tiny: SimpleNamespace, tmp_path: Path) -> None:
    module = Own()
    callbacks = [BitFlips(1), WeightScales(1), Progressive("mix", 2), AnnealedGradient(2)]
    trainer = tiny.trainer(tmp_path, callbacks, max_steps=3)
    trainer.fit(module, tiny.data())
    logged = trainer.callback_metrics
    assert {"flips/rate/net.0", "flips/rate/net.2", "scales/net.0/mean", "scales/net.2/mean"} <= logged.keys()
    assert all(layer.unfinished is None and layer.widening == 1 for layer in (module.net[0], module.net[2]))
