"""How many signs change."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bimamba_lit.binarize import BinaryLinear
from bimamba_lit.callbacks.sharded import whole
from bimamba_lit.callbacks.steps import EverySteps, latent_layers, report
from bimamba_lit.errors import UserError
from bimamba_lit.ops import pack_signs


class BitFlips(pl.Callback):
    """Logs the share of signs that changed: FBI-LLM's flip-flop ratio (arXiv 2407.07093).

    ``flips/rate`` is taken over all binary layers of the model between this log and the one before, and
    ``flips/rate/LAYER`` by layer, LAYER being its dotted name within the model: ``pl_module.lm``, or ``pl_module``
    itself where it has none. ``flips/since_start`` and ``flips/since_start/LAYER`` compare with the signs training
    started from. All are shares of 1. The rate depends on ``every_n_steps``: compare runs that have the same.

    The snapshots are packed, an eighth of a byte a sign, lie on the layer's device and are part of the checkpoint, so
    that a resumed run logs what an uninterrupted one would. Those of a layer that is not binary yet (`Progressive`) are
    of its latent weights. Under DDP every rank holds the same signs, and no rank communicates; sharded weights (FSDP2)
    are gathered one layer at a time, and every rank keeps all signs. A model without binary layers, such as a teacher,
    logs nothing.

    A layer whose signs have frozen is told once by name: from one log to the next none of them changed, for
    ``frozen_after`` steps on end. (A sign that flips and flips back between two logs is not seen.)

    Args:
        every_n_steps: Optimizer steps between two logs.
        frozen_after: Steps without a flip after which a layer is told of; 0 for never.

    Raises:
        UserError: If ``every_n_steps`` is less than 1 or ``frozen_after`` less than 0.
    """

    def __init__(self, every_n_steps: int = 50, frozen_after: int = 1000) -> None:
        if frozen_after < 0:
            raise UserError(f"BitFlips: frozen_after is {frozen_after}, where 0 or more is needed")
        self.every_n_steps = every_n_steps
        self.frozen_after = frozen_after
        self._still: dict[str, int] = {}
        self._steps = EverySteps(self, every_n_steps)
        self._start: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the first snapshot, unless a checkpoint brought it."""
        self._steps.start(trainer)
        layers = latent_layers(pl_module)
        if not layers:
            rank_zero_info("BitFlips: the model has no binary layer, so there are no signs to watch.")
        for snapshots in (self._start, self._last):
            for name, layer in layers.items():
                kept = snapshots.get(name)
                rows, inputs = layer.latent.shape
                if kept is not None and kept.shape != (rows, -(-inputs // 8)):
                    raise UserError(f"BitFlips: the checkpoint's signs of {name} are of another layer or damaged")
                snapshots[name] = _packed_signs(layer) if kept is None else kept.to(layer.latent.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Compare with the snapshots and log, at the steps that are multiples of ``every_n_steps``."""
        if not self._start or not self._steps.due(trainer):
            return
        layers = latent_layers(pl_module)
        now = {name: _packed_signs(layer) for name, layer in layers.items()}
        flips = {
            # After a rewind the snapshots come from a checkpoint, on the CPU.
            "flips/rate": [count_flips(now[name], self._last[name].to(now[name].device)) for name in layers],
            "flips/since_start": [count_flips(now[name], self._start[name].to(now[name].device)) for name in layers],
        }
        counts = torch.stack([torch.stack(column) for column in flips.values()]).tolist()
        signs = [layer.in_features * layer.out_features for layer in layers.values()]
        metrics = {}
        for metric, column in zip(flips, counts, strict=True):
            metrics[metric] = sum(column) / sum(signs)
            metrics |= {f"{metric}/{name}": n / of for name, n, of in zip(layers, column, signs, strict=True)}
        self._last = now
        report(trainer, pl_module, metrics, prog_bar="flips/rate")
        self._tell_frozen(trainer, dict(zip(layers, counts[0], strict=True)))

    def _tell_frozen(self, trainer: pl.Trainer, flips: dict[str, int]) -> None:
        for name, count in flips.items():
            before = self._still.get(name, 0)
            if before < 0 or not self.frozen_after:  # told already
                continue
            self._still[name] = before + self.every_n_steps if count == 0 else 0
            if self._still[name] >= self.frozen_after:
                rank_zero_info(
                    f"BitFlips: step {trainer.global_step}: no sign of {name} has changed for {self._still[name]} steps"
                )
                self._still[name] = -1

    def state_dict(self) -> dict[str, Any]:
        """Return both snapshots, by layer, uint8 ``(O, ceil(I / 8))``, and the steps without a flip (-1: told of)."""
        return {"start": dict(self._start), "last": dict(self._last), "still": dict(self._still)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the snapshots of a checkpoint."""
        self._start, self._last = dict(state_dict["start"]), dict(state_dict["last"])
        self._still = {name: int(steps) for name, steps in state_dict["still"].items()}


def count_flips(before: Tensor, after: Tensor) -> Tensor:
    """Return the number of bits that differ between two packed snapshots of one shape, as a scalar int64 tensor."""
    return _ones_in_a_byte(before.device)[(before ^ after).int()].sum()


def _packed_signs(layer: BinaryLinear) -> Tensor:
    return pack_signs(whole(layer).centred().detach())


def _ones_in_a_byte(device: torch.device) -> Tensor:
    return torch.tensor([byte.bit_count() for byte in range(256)], device=device)
