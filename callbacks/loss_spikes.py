"""Going back to before a loss spike, and on with other data.

A rewind is what a resume would be, with one difference: weights, optimizer, schedule, step counter and the state of
other callbacks are those of the newest checkpoint, and the data is not: what was read since is skipped. Since the spike
is seen before the checkpoint callback runs, that checkpoint is from before it. A run that is killed meanwhile and
resumed sees the same spike again and does the same.
"""

import math
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bimamba_lit.callbacks.random_state import RandomState
from bimamba_lit.callbacks.steps import EverySteps
from bimamba_lit.callbacks.throughput import Throughput
from bimamba_lit.errors import UserError

_GO_ON = (ModelCheckpoint, RandomState, Throughput)
"""Callbacks that a rewind leaves as they are: what was spent is spent, and random numbers need not repeat."""


class LossSpikeGuard(pl.Callback):
    """Takes training back to the newest checkpoint when the loss spikes, and skips the data that came since.

    A step's loss is a spike when it is above the mean of the last ``window`` steps by ``sigmas`` of their standard
    deviations; over ranks and accumulated batches the loss is the mean. A loss that is not finite is
    :class:`NonFiniteGuard`'s business. Where there is no checkpoint yet, a spike is told and training goes on. The rows
    of the steps taken back leave ``metrics.csv``; callbacks with a method ``on_rewind(trainer)`` are told.

    Every step waits for its loss, as it does for :class:`NonFiniteGuard`.

    Args:
        window: Steps that a loss is compared with; no step before so many is a spike.
        sigmas: Standard deviations above their mean that make a spike.
        max_rewinds: Rewinds in a run; at the next spike training stops.

    Attributes:
        rewinds: Rewinds so far.

    Raises:
        UserError: If a setting is out of range; if the loss spikes once more than ``max_rewinds`` times.
    """

    def __init__(self, window: int = 100, sigmas: float = 6.0, max_rewinds: int = 10) -> None:
        if window < 2:
            raise UserError(f"LossSpikeGuard: window is {window}, where 2 or more is needed")
        if not sigmas > 0 or max_rewinds < 0:
            raise UserError(
                f"LossSpikeGuard: sigmas is {sigmas} and max_rewinds {max_rewinds}; they must be above 0 and 0 or more"
            )
        self.window = window
        self.sigmas = sigmas
        self.max_rewinds = max_rewinds
        self.rewinds = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._parts: list[Tensor] = []
        self._step = 0
        self._rewound = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step that training starts at."""
        self._step, self._parts, self._rewound = trainer.global_step, [], False

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss of a batch, which Lightning has divided by the batches of a step."""
        self._parts.append(loss.detach())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look at the loss of the step just taken."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        total = sum(self._parts[1:], self._parts[0].float())
        self._parts = []
        loss = float(trainer.strategy.reduce(total, reduce_op="mean"))
        if not math.isfinite(loss):
            return
        limit = self._limit()
        if loss > limit:
            self._rewind(trainer, f"step {trainer.global_step}: the loss of {loss:.4g} is above {limit:.4g}")
        else:
            self._losses.append(loss)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Number what is logged anew after a rewind: Lightning has logged the step that was taken back by now."""
        self._renumber(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise, where the data ended."""
        self._renumber(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses to compare with and the rewinds."""
        return {"losses": list(self._losses), "rewinds": self.rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._losses = deque(map(float, state_dict["losses"]), self.window)
        self.rewinds = int(state_dict["rewinds"])

    def _limit(self) -> float:
        """Return the loss above which a step is a spike."""
        if len(self._losses) < self.window:
            return math.inf
        return fmean(self._losses) + self.sigmas * pstdev(self._losses)

    def _rewind(self, trainer: pl.Trainer, told: str) -> None:
        told = f"{told}, {self.sigmas:g} standard deviations over the mean of the last {self.window} steps"
        path = _newest_checkpoint(trainer)
        if path is None:
            rank_zero_info(f"LossSpikeGuard: {told}; there is no checkpoint yet to go back to")
            return
        if self.rewinds == self.max_rewinds:
            raise UserError(
                f"training stopped after {self.rewinds} rewinds: {told}; lower the learning rate, or look at the data"
            )
        self.rewinds += 1
        checkpoint = restore(trainer, path, [one for one in trainer.callbacks if one is not self])  # type: ignore[attr-defined]
        before = checkpoint["callbacks"].get(self.state_key)
        self._losses = deque(before["losses"] if before else [], self.window)
        rank_zero_info(
            f"LossSpikeGuard: {told}; back to step {trainer.global_step}, without the data since then "
            f"(rewind {self.rewinds} of {self.max_rewinds})"
        )
        self._step, self._rewound = trainer.global_step, True

    def _renumber(self, trainer: pl.Trainer) -> None:
        if not self._rewound:
            return
        self._rewound = False
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (on_rewind := getattr(callback, "on_rewind", None)) is not None:
                on_rewind(trainer)
            if isinstance(steps := getattr(callback, "_steps", None), EverySteps):
                steps.start(trainer)


def restore(trainer: pl.Trainer, path: Path, callbacks: list[pl.Callback]) -> dict[str, Any]:
    """Take training back to a checkpoint in everything but the data and the epoch, and return the checkpoint.

    Args:
        trainer: In the middle of a fit.
        path: The checkpoint, the same on every rank.
        callbacks: Those whose state goes back too, unless it is one that goes on in any case.
    """
    strategy = trainer.strategy
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state_dict(checkpoint)
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.load_state_dict(progress)
    for callback in callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if state is not None and not isinstance(callback, _GO_ON):
            callback.load_state_dict(state)
    return checkpoint


def _newest_checkpoint(trainer: pl.Trainer) -> Path | None:
    named = (getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks)
    paths = [Path(name) for name in named if name]
    return max((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime_ns, default=None)
