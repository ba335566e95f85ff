"""What the scales of binary layers do in training."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bimamba_lit.binarize import BinaryLinear
from bimamba_lit.callbacks.sharded import whole
from bimamba_lit.callbacks.steps import EverySteps, report

MULTIPLIERS = ("in_scale", "out_scale", "group_scale")
NEAR_ZERO = 0.01
"""A scale counts as collapsed under this share of the layer's mean latent magnitude."""


class WeightScales(pl.Callback):
    """Logs ``scales/LAYER/{mean,std,min,max,near_zero}``, to see learnable scales collapse.

    The figures are over all multiplicative scales of a binary layer together (``in_scale``, ``out_scale`` and
    ``group_scale`` of its terms); ``std`` is the population's. ``near_zero`` is the share of scales whose magnitude is
    under 1% of the layer's mean abs(latent). Collapse is what Ternary Mamba (arXiv 2606.18114) warns of. A scheme
    without scales logs nothing.

    Args:
        every_n_steps: Optimizer steps between two logs.

    Raises:
        UserError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._steps = EverySteps(self, every_n_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step that training starts at."""
        self._steps.start(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at the steps that are multiples of ``every_n_steps``."""
        if not self._steps.due(trainer):
            return
        assert isinstance(pl_module.lm, torch.nn.Module)
        layers = {name: layer for name, layer in pl_module.lm.named_modules() if isinstance(layer, BinaryLinear)}
        found = {
            name: figures for name, layer in layers.items() if (figures := scale_figures(whole(layer))) is not None
        }
        if not found:
            return
        keys = ("mean", "std", "min", "max", "near_zero")
        rows = torch.stack(list(found.values())).tolist()
        pairs = zip(found, rows, strict=True)
        metrics = {f"scales/{name}/{key}": row[i] for name, row in pairs for i, key in enumerate(keys)}
        report(trainer, pl_module, metrics)


@torch.no_grad()
def scale_figures(layer: BinaryLinear) -> Tensor | None:
    """Return mean, std, min, max and share near zero of a layer's scales, fp32 ``(5,)``; None if it has no scale."""
    parts = [term.flatten().float() for name, term in layer.terms().items() if name in MULTIPLIERS]
    if not parts:
        return None
    scales = torch.cat(parts)
    near_zero = scales.abs() < NEAR_ZERO * layer.latent.abs().mean()
    return torch.stack([scales.mean(), scales.std(correction=0), scales.min(), scales.max(), near_zero.float().mean()])
