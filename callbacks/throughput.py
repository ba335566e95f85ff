"""Tokens and seconds of training."""

from time import perf_counter
from typing import Any

import lightning.pytorch as pl

from bimamba_lit.callbacks.steps import EverySteps, report


class Throughput(pl.Callback):
    """Logs ``speed/tokens_per_second`` and ``speed/tokens_seen``, and keeps the totals over resumes.

    Tokens are ``batch["input_ids"].numel()`` times the world size. The clock is wall-clock time, waiting for data
    included. It stops when validation or the writing of a checkpoint begins and runs again at the start of the next
    batch, so it misses the wait for that one batch's data. On a GPU work is queued: what is still queued at a log is
    counted with the steps after it.

    Args:
        every_n_steps: Optimizer steps between two logs; the rate is over these steps.

    Attributes:
        tokens_seen: Tokens trained on, on all ranks, since the run began.
        seconds: Seconds of training since the run began.

    Raises:
        UserError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._steps = EverySteps(self, every_n_steps)
        self.tokens_seen = 0
        self.seconds = 0.0
        self._running_since: float | None = None
        self._logged = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new interval."""
        self._steps.start(trainer)
        self._running_since = None
        self._logged = (self.tokens_seen, self.seconds)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock where it stands still."""
        if self._running_since is None:
            self._running_since = perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log at the steps that are multiples of ``every_n_steps``."""
        self.tokens_seen += batch["input_ids"].numel() * trainer.world_size
        self._read_clock()
        if not self._steps.due(trainer):
            return
        tokens, seconds = self.tokens_seen - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.tokens_seen, self.seconds)
        metrics = {"speed/tokens_seen": float(self.tokens_seen)}
        if seconds > 0:
            metrics["speed/tokens_per_second"] = tokens / seconds
        report(trainer, pl_module, metrics)

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock."""
        self._stop_clock()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Stop the clock."""
        self._stop_clock()

    def on_train_end(self, *_: Any) -> None:
        """Stop the clock."""
        self._running_since = None

    def state_dict(self) -> dict[str, Any]:
        """Return the totals."""
        return {"tokens_seen": self.tokens_seen, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals of a checkpoint."""
        self.tokens_seen, self.seconds = int(state_dict["tokens_seen"]), float(state_dict["seconds"])

    def _read_clock(self) -> None:
        now = perf_counter()
        if self._running_since is not None:
            self.seconds += now - self._running_since
            self._running_since = now

    def _stop_clock(self) -> None:
        self._read_clock()
        self._running_since = None
