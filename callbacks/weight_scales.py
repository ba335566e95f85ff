"""What the scales of binary layers do in training."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bimamba_lit.binarize import BinaryLinear
from bimamba_lit.callbacks.sharded import whole
from bimamba_lit.callbacks.steps import EverySteps, latent_layers, report
from bimamba_lit.errors import UserError

MULTIPLIERS = ("in_scale", "out_scale", "group_scale")
NEAR_ZERO = 0.01
"""A scale counts as collapsed under this share of the layer's mean latent magnitude."""


class WeightScales(pl.Callback):
    """Logs ``scales/LAYER/{mean,std,min,max,near_zero}``, to see learnable scales collapse.

    The figures are over all multiplicative scales of a binary layer together (``in_scale``, ``out_scale`` and
    ``group_scale`` of its terms); ``std`` is the population's. ``near_zero`` is the share of scales whose magnitude is
    under 1% of the layer's mean abs(latent). Collapse is what Ternary Mamba (arXiv 2606.18114) warns of. A scheme
    without scales logs nothing. A layer is told of once by name when ``dead_share`` of its scales are near zero.

    Args:
        every_n_steps: Optimizer steps between two logs.
        dead_share: The share near zero, above 0 to 1, from which a layer is told of.

    Raises:
        UserError: If a setting is out of range.
    """

    def __init__(self, every_n_steps: int = 50, dead_share: float = 0.1) -> None:
        if not 0 < dead_share <= 1:
            raise UserError(f"WeightScales: dead_share is {dead_share}, where a share above 0 and at most 1 is needed")
        self.every_n_steps = every_n_steps
        self.dead_share = dead_share
        self._told: list[str] = []
        self._steps = EverySteps(self, every_n_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step that training starts at."""
        self._steps.start(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at the steps that are multiples of ``every_n_steps``."""
        if not self._steps.due(trainer):
            return
        layers = latent_layers(pl_module).items()
        found = {name: figures for name, layer in layers if (figures := scale_figures(whole(layer))) is not None}
        if not found:
            return
        keys = ("mean", "std", "min", "max", "near_zero")
        rows = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        metrics = {f"scales/{name}/{key}": row[i] for name, row in rows.items() for i, key in enumerate(keys)}
        report(trainer, pl_module, metrics)
        for name, row in rows.items():
            if row[-1] >= self.dead_share and name not in self._told:
                self._told.append(name)
                rank_zero_info(f"WeightScales: step {trainer.global_step}: {row[-1]:.0%} of {name}'s scales are dead")

    def state_dict(self) -> dict[str, Any]:
        """Return which layers were told of."""
        return {"told": list(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tell of no layer twice after a resume."""
        self._told = list(state_dict["told"])


@torch.no_grad()
def scale_figures(layer: BinaryLinear) -> Tensor | None:
    """Return mean, std, min, max and share near zero of a layer's scales, fp32 ``(5,)``; None if it has no scale."""
    parts = [term.flatten().float() for name, term in layer.terms().items() if name in MULTIPLIERS]
    if not parts:
        return None
    scales = torch.cat(parts)
    near_zero = scales.abs() < NEAR_ZERO * layer.latent.abs().mean()
    return torch.stack([scales.mean(), scales.std(correction=0), scales.min(), scales.max(), near_zero.float().mean()])
