import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bimamba_lit.binarize import FBI, BinaryLinear, ScaledSign, Sign
from bimamba_lit.callbacks import WeightScales
from bimamba_lit.callbacks.weight_scales import scale_figures
from bimamba_lit.errors import UserError
from bimamba_lit.training.csv_logger import CSVLogger

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

LAYERS = ("backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj")


class Grouped(BinaryLinear):
    """Every multiplicative term there is, and a shift that must not count."""

    def terms(self) -> dict[str, Tensor]:
        return {
            "in_scale": torch.full((self.in_features,), 2.0),
            "out_scale": torch.zeros(self.out_features),
            "group_scale": torch.full((self.out_features, 2), -1.0),
            "in_shift": torch.full((self.in_features,), 1000.0),
        }


def test_the_figures_are_over_all_multiplicative_scales() -> None:
    layer = Grouped(nn.Linear(4, 3, bias=False))
    scales = torch.tensor([2.0] * 4 + [0.0] * 3 + [-1.0] * 6)
    figures = scale_figures(layer)
    assert figures is not None
    expected = [scales.mean(), scales.std(correction=0), -1.0, 2.0, 3 / 13]
    torch.testing.assert_close(figures, torch.tensor(expected))
    assert not figures.requires_grad


def test_near_zero_is_a_share_of_the_latent_magnitude() -> None:
    layer = FBI(nn.Linear(4, 8, bias=False))
    with torch.no_grad():
        layer.latent.fill_(-10.0)
        layer.get_parameter("in_scale").copy_(torch.tensor([0.0999, -0.0999, 0.1001, -5.0]))
    figures = scale_figures(layer)
    assert figures is not None
    assert figures[4].item() == pytest.approx(0.5)


def test_a_single_scale_spreads_by_nothing() -> None:
    figures = scale_figures(FBI(nn.Linear(4, 8), pattern="single"))
    assert figures is not None
    assert figures[1].item() == 0


def test_the_log_has_the_scales_of_the_step(tiny: SimpleNamespace, tmp_path: Path) -> None:
    module = tiny.module(scheme=ScaledSign)
    trainer = tiny.trainer(tmp_path, [WeightScales(2)], max_steps=5, logger=CSVLogger(tmp_path), log_every_n_steps=5)
    trainer.fit(module, tiny.data())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [f"scales/{layer}/{key}" for layer in LAYERS for key in ("mean", "std", "min", "max", "near_zero")]
    assert [row["step"] for row in rows if row[keys[0]]] == ["1", "3"]
    assert all(row[key] for row in rows[:2] for key in keys)
    trainer = tiny.trainer(tmp_path, [WeightScales(1)], max_steps=1, logger=CSVLogger(tmp_path))
    trainer.fit(module, tiny.data())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    for layer in LAYERS:
        scale: Any = module.lm.get_submodule(layer).terms()["out_scale"]
        assert float(row[f"scales/{layer}/mean"]) == pytest.approx(scale.mean().item())
        assert float(row[f"scales/{layer}/max"]) == pytest.approx(scale.max().item())


@pytest.mark.parametrize("scheme", [None, Sign])
def test_without_scales_nothing_is_logged(tiny: SimpleNamespace, tmp_path: Path, scheme: Any) -> None:
    trainer = tiny.trainer(tmp_path, [WeightScales(1)], max_steps=2)
    trainer.fit(tiny.module(scheme=scheme), tiny.data())
    assert not any(name.startswith("scales/") for name in trainer.callback_metrics)


def test_a_layer_with_dead_scales_is_told_of_once(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny.module(lr=0.0)
    with torch.no_grad():
        module.lm.get_parameter(f"{LAYERS[1]}.in_scale")[:6] = 0.0  # of 24
    watch = WeightScales(1, dead_share=0.25)
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, [watch], max_steps=3).fit(module, tiny.data())
        told = [record.getMessage() for record in caplog.records if "WeightScales" in record.getMessage()]
        assert told == [f"WeightScales: step 1: 25% of {LAYERS[1]}'s scales are dead"]
        caplog.clear()
        resumed = WeightScales(1, dead_share=0.25)
        resumed.load_state_dict(watch.state_dict())
        for other in (resumed, WeightScales(1, dead_share=0.26)):
            tiny.trainer(tmp_path, [other], max_steps=1).fit(module, tiny.data())
        assert "WeightScales" not in caplog.text
    with pytest.raises(UserError, match="dead_share is 0"):
        WeightScales(dead_share=0)
