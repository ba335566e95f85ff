"""Narrowing the straight-through gradient, over the steps of training."""

from typing import Any

import lightning.pytorch as pl

from bimamba_lit.callbacks.steps import StepRange, latent_layers
from bimamba_lit.errors import UserError


class AnnealedGradient(pl.Callback):
    """Narrows the gradient that stands in for that of the sign between two steps, from soft to hard.

    Up to ``start_step`` it reaches ``softest`` times as far as the scheme's ``reach``, so that almost every latent
    weight is moved; from ``end_step`` on as far as ``reach``; between them the factor falls by the same ratio every
    step, as IR-Net's does (arXiv 1909.10788, section 3.3, there with tanh). The forward pass is that of the binary
    weight throughout. A resumed run goes on where it was: the factor follows from the step.

    Args:
        end_step: The optimizer step that is the first with the scheme's own reach; a number below 1 is a share of
            ``trainer.max_steps``.
        start_step: The optimizer step up to which the gradient is softest.
        softest: How many times its reach the gradient reaches at first.

    Raises:
        UserError: If the steps are not ``0 <= start_step < end_step``, ``softest`` is not above 1, or a binary layer's
            gradient has no reach.
    """

    def __init__(self, end_step: float, start_step: int = 0, softest: float = 10.0) -> None:
        if not softest > 1:
            raise UserError(f"AnnealedGradient: softest is {softest}, and must be above 1")
        self.softest = softest
        self._steps = StepRange(self, start_step, end_step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to narrow."""
        self._steps.begin(trainer, pl_module)
        for layer in latent_layers(pl_module).values():
            if layer.reach is None or layer.straight_through == "identity":
                raise UserError(
                    "AnnealedGradient narrows the reach of a gradient: give the binarizer a reach, and clipped, tanh "
                    f"or bireal as straight_through; it has {layer.straight_through} and the reach "
                    f"{'null' if layer.reach is None else layer.reach}"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the reach to where the run is."""
        self._set(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set the reach to where the next step is to be."""
        self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer in latent_layers(pl_module).values():
            layer.widening = self.softest ** (1 - self._steps.share(trainer.global_step))
