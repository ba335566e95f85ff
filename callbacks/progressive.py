"""Making layers binary bit by bit, over the steps of training."""

from typing import Any, Literal

import lightning.pytorch as pl

from bimamba_lit.binarize import Unfinished
from bimamba_lit.callbacks.steps import StepRange, latent_layers


class Progressive(pl.Callback):
    """Takes the binary layers of a model from full precision to binary between two steps.

    The model is ``pl_module.lm``, or ``pl_module`` itself where it has none.

    With ``share`` growing from 0 at ``start_step`` to 1 at ``end_step`` in a straight line, the optimizer's next step
    is taken with

    * ``layers``: the first ``share`` of the layers binary, in the model's order, the others multiplying by their latent
      weights;
    * ``rows``, ``mix``, ``tanh``: every layer as far as :class:`bimamba_lit.binarize.Unfinished` has it.

    With ``layers``, ``rows`` and ``mix`` give the scheme a ``reach``: without one the gradients of latent weights
    shrink to the size of the weights as layers become binary, and AdamW, whose averages remember the larger ones, all
    but stops for a while. The best recipe of RESULTS.md, by ``tanh``, has none: its signs stand still from
    ``end_step`` on.

    From ``end_step`` on all layers are binary and cost what they would without this callback. What a layer multiplies
    by is what validation, samples and a saved checkpoint have too; ``bimamba export`` refuses to pack a model whose
    layers are not all binary, and its size is told at 16 bits a weight of those. A resumed run goes on where it was:
    the share follows from the step.

    Layers of more than one sign a weight (`Ternary`, `TwoBit`) are left alone.

    Args:
        by: ``layers``, ``rows``, ``mix`` or ``tanh``.
        end_step: The optimizer step that is the first with binary layers alone; a number below 1 is a share of
            ``trainer.max_steps``.
        start_step: The optimizer step up to which no layer is binary (none at all, with ``layers`` and ``rows``).

    Raises:
        UserError: If the steps are not ``0 <= start_step < end_step``.
    """

    def __init__(self, by: Literal["layers", "rows", "mix", "tanh"], end_step: float, start_step: int = 0) -> None:
        self.by = by
        self._steps = StepRange(self, start_step, end_step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where the model will not be binary at the end, or there is nothing to make binary."""
        self._steps.begin(trainer, pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the layers to where the run is."""
        self._set(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the layers to where the run is."""
        self._set(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set the layers to where the next step is to be."""
        self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share = self._steps.share(trainer.global_step)
        layers = latent_layers(pl_module).values()
        for index, layer in enumerate(layers):
            if share == 1 or (self.by == "layers" and index < int(share * len(layers))):
                layer.unfinished = None
            else:
                layer.unfinished = Unfinished("mix", 0.0) if self.by == "layers" else Unfinished(self.by, share)
