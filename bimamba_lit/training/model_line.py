"""One line about the model when a run begins."""

import lightning.pytorch as pl

from bimamba_lit.models.count import count_parameters, true_bits
from bimamba_lit.training.language import LanguageModule, scheme_name

_BITS_PER_MIB = 8 * 1024**2


class ModelLine(pl.Callback):
    """Prints the model's size, how much of it is binary and what it takes to store; Lightning's table has neither."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line."""
        if not (trainer.is_global_zero and isinstance(pl_module, LanguageModule)):
            return
        total, binarized = count_parameters(pl_module.lm)
        scheme = scheme_name(pl_module.lm, trained=True)
        kind = "full precision" if scheme == "fp" else f"{binarized / total:.1%} binary ({scheme})"
        print(f"MambaLM: {total:,} parameters, {kind}, {true_bits(pl_module.lm) / _BITS_PER_MIB:.2f} MiB deployed")
