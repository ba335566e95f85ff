"""One line about the model when a run begins, and one on a schedule that the run is too short for."""

import lightning.pytorch as pl

from bimamba_lit.binarize.ptb.layer import PREFIX
from bimamba_lit.callbacks.steps import latent_layers
from bimamba_lit.models.count import count_parameters, true_bits
from bimamba_lit.training.language import LanguageModule, scheme_name
from bimamba_lit.training.ptb import PTB

_BITS_PER_MIB = 8 * 1024**2


class ModelLine(pl.Callback):
    """Prints the model's size, how much of it is binary and what it takes to store; Lightning's table has neither."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line."""
        if not (trainer.is_global_zero and isinstance(pl_module, LanguageModule)):
            return
        total, binarized = count_parameters(pl_module.lm)
        scheme = scheme_name(pl_module.lm, trained=True)
        bits = _finished_bits(pl_module)
        size = f"{bits / _BITS_PER_MIB:.2f} MiB deployed"
        if scheme != "fp":
            kind = f"{binarized / total:.1%} in {scheme} layers"
        elif isinstance(pl_module, PTB):
            kind, size = f"to be binarized by {PREFIX}{type(pl_module.scheme).__name__}", f"{size} before"
        else:
            kind = "full precision"
        print(f"MambaLM: {total:,} parameters, {kind}, {size}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the learning rate does not come to its highest, as in a short try of a recipe for long runs."""
        if not (trainer.is_global_zero and trainer.optimizers and isinstance(pl_module, LanguageModule)):
            return
        if not pl_module.automatic_optimization:  # a calibration has no learning rate
            return
        settings = pl_module.optimizer_settings
        if 0 < trainer.max_steps <= settings.warmup_steps:
            print(
                f"the run ends within its warm-up: after {trainer.max_steps} of {settings.warmup_steps} steps the "
                f"learning rate has not come to {settings.lr:g}; lower model.optimizer.warmup_steps"
            )


def _finished_bits(pl_module: LanguageModule) -> int:
    """Return what a model takes to store once its layers are binary, which those of a resumed run may not be yet."""
    layers = {layer: layer.unfinished for layer in latent_layers(pl_module).values()}
    for layer in layers:
        layer.unfinished = None
    bits = true_bits(pl_module.lm)
    for layer, unfinished in layers.items():
        layer.unfinished = unfinished
    return bits
