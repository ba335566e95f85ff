"""Keeping the random state in checkpoints."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist


class RandomState(pl.Callback):
    """Saves the random state of Python, NumPy, torch and CUDA with a checkpoint and restores it before what comes next.

    Lightning's checkpoints hold none, so a resumed run would draw other numbers than one never stopped. Every process
    of a run has a state of its own. Everything is kept as lists and tensors: NumPy's own state does not load under
    ``weights_only=True``.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the present random states of all processes, by rank; within a validation, those before it.

        A resumed run begins the validation anew. Every process has to call this at the same point.
        """
        state = self._before_validation or _present()
        states: list[Any] = [state]
        if dist.is_initialized() and dist.get_world_size() > 1:
            states *= dist.get_world_size()
            dist.all_gather_object(states, state)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's random state for later: building the loaders draws numbers of its own."""
        states = state_dict["ranks"]
        self._restored = states[(dist.get_rank() if dist.is_initialized() else 0) % len(states)]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random state once, in the first batch after a resume."""
        self._restore()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore it where a resumed run begins with the validation that was due; keep it in case one breaks off."""
        if not trainer.sanity_checking:
            self._restore()
            self._before_validation = _present()

    def on_validation_end(self, *_: Any) -> None:
        """Go on with the state that the validation leaves."""
        self._before_validation = None

    def _restore(self) -> None:
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def _present() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
