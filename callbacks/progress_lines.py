"""Progress where no terminal can show a bar: in a log file or a CI run."""

from typing import Any

import lightning.pytorch as pl

from bimamba_lit.callbacks.steps import EverySteps


class ProgressLines(pl.Callback):
    """Prints one line every few steps with what the progress bar would show, and one after each validation.

    Args:
        every_n_steps: Optimizer steps between two lines.

    Raises:
        UserError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self._steps = EverySteps(self, every_n_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step that training starts or resumes at."""
        self._steps.start(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the figures of the progress bar."""
        if self._steps.due(trainer) and trainer.is_global_zero:
            figures = {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
            self._print(trainer, figures)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the figures of the validation."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._print(trainer, {name: value for name, value in metrics.items() if name.startswith("val/")})

    @staticmethod
    def _print(trainer: pl.Trainer, figures: dict[str, Any]) -> None:
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        step = f"step {trainer.global_step}{total}  " if trainer.global_step else ""  # none where nothing is trained
        shown = "  ".join(f"{name} {float(value):.4g}" for name, value in figures.items())
        print(f"{step}{shown}", flush=True)
