"""When a callback acts, and where its figures go.

Figures of callbacks are handed to the loggers here, at the step they belong to, and to ``pl_module.log_dict`` only for
the progress bar and ``trainer.callback_metrics``. Logged the usual way they would be dropped at steps that are no
multiple of ``trainer.log_every_n_steps``, and repeated in every later row of the epoch: Lightning keeps the last value
of a metric and writes it again with the next ones, and a resumed run would write other rows than an uninterrupted one.
"""

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from bimamba_lit.binarize import BinaryLinear
from bimamba_lit.errors import UserError


class EverySteps:
    """Tells when the optimizer has just taken a step that is a multiple of ``every_n_steps``.

    Args:
        owner: The callback, named in the error.
        every_n_steps: Optimizer steps from one time to the next.

    Raises:
        UserError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, owner: object, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UserError(f"{type(owner).__name__}: every_n_steps is {every_n_steps}, where 1 or more is needed")
        self.every_n_steps = every_n_steps
        self._seen = 0

    def start(self, trainer: pl.Trainer) -> None:
        """Note the step that training starts or resumes at."""
        self._seen = trainer.global_step

    def due(self, trainer: pl.Trainer) -> bool:
        """Say, at the end of a batch, whether to act: once a step, however many batches it accumulates."""
        step = trainer.global_step
        if step == self._seen:
            return False
        self._seen = step
        return step % self.every_n_steps == 0


class StepRange:
    """What changes from one optimizer step to another.

    Args:
        owner: The callback, named in the error.
        start: The step up to which nothing has changed.
        end: The first step at which all has; below 1, the share of the run's steps.

    Raises:
        UserError: If they are not ``0 <= start < end``.
    """

    def __init__(self, owner: object, start: int, end: float) -> None:
        self._owner = type(owner).__name__
        self._start, self._given = start, end
        self._end: float = end
        if end >= 1 and end % 1:  # of infinity it is no number
            raise UserError(f"{self._owner}: end_step is {end}; it must be a whole step, or a share of the run below 1")
        if not 0 < end < 1:
            self._check()

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the end in this run, and say so where there is nothing to change, or the run stops before the end.

        Raises:
            UserError: If the end is a share of a run that has no ``max_steps``, or not after the start.
        """
        if 0 < self._given < 1:
            if trainer.max_steps < 0:
                raise UserError(f"{self._owner}: end_step is {self._given}, a share of trainer.max_steps: set that too")
            self._end = round(self._given * trainer.max_steps)
        self._check()
        if not latent_layers(pl_module):
            rank_zero_info(f"{self._owner}: the model has no layer of one sign a weight, so it changes nothing")
        elif 0 <= trainer.max_steps < self._end:
            rank_zero_info(
                f"{self._owner}: end_step is {self._end:g}, after this run's last step, {trainer.max_steps}: "
                "the schedule does not reach its end"
            )

    def share(self, step: int) -> float:
        """Return how much has changed, 0 to 1, for the optimizer step that follows ``step`` steps."""
        return min(1.0, max(0.0, (step - self._start) / (self._end - self._start)))

    def _check(self) -> None:
        if not 0 <= self._start < self._end:
            given = f"start_step is {self._start} and end_step {self._end:g}"
            raise UserError(f"{self._owner}: {given}, and must be 0 <= start < end")


def latent_layers(pl_module: pl.LightningModule) -> dict[str, BinaryLinear]:
    """Return the binary layers in training by dotted name, in the model's order.

    The model is ``pl_module.lm``, or ``pl_module`` itself where it has none.
    """
    model = getattr(pl_module, "lm", pl_module)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}


def report(
    trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, float], prog_bar: str | None = None
) -> None:
    """Hand figures to every logger, in the row of the step just taken, and to ``trainer.callback_metrics``.

    Args:
        trainer: The trainer.
        pl_module: The module being trained.
        metrics: Figures by name, the same on every rank.
        prog_bar: The name of the one to show in the progress bar.
    """
    for logger in trainer.loggers:
        # Lightning numbers the rows of training from 0: the first step is row 0.
        logger.log_metrics(dict(metrics), step=trainer.global_step - 1)
    for name, value in metrics.items():
        pl_module.log(name, value, logger=False, prog_bar=name == prog_bar, on_step=True, on_epoch=False)
