"""Stopping, or skipping a step, before a non-finite value reaches the weights.

Losses are kept on the device and looked at together with the gradients' norm, just before the optimizer steps: one wait
for the device a step instead of one a batch. The backward pass of a non-finite loss is wasted, the weights are not
touched, and under DDP every rank sees the non-finite gradients and stops, where a rank that stopped before its backward
pass would leave the others waiting.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bimamba_lit.callbacks.sharded import is_sharded
from bimamba_lit.errors import UserError

_NAMED = 3


class NonFiniteGuard(pl.Callback):
    """Stops training before the optimizer step when the loss or the norm of the gradients is not finite.

    The error names the step, the batches and their sequences, and the module: the parameters that are not finite
    already; else, for a loss, the first module that puts out a non-finite value when the batch is run again; else, for
    gradients, the parameters they belong to, those nearest the loss first. Under ``16-mixed`` precision the gradients
    are left to the gradient scaler, which skips a step whose gradients overflow; the loss is still watched.

    With ``skip`` such a step is left out instead: weights and optimizer stay as they are, the schedule and the data go
    on. What was wrong is told, and ``guard/skipped_steps``, the number of steps left out so far, logged.

    Args:
        skip: Steps in a row that may be left out; the next one stops training. 0 stops at the first.

    Attributes:
        skipped: Steps left out since the run began.

    Raises:
        UserError: When it stops, or ``skip`` is less than 0.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise UserError(f"NonFiniteGuard: skip is {skip}, where 0 or more is needed")
        self.skip = skip
        self.skipped = 0
        self._in_a_row = 0
        self._batch: tuple[Any, int] = (None, 0)
        self._losses: list[tuple[Any, int, Tensor]] = []

    def on_train_start(self, *_: Any) -> None:
        """Forget what an interrupted run left."""
        self._losses = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to run it again if it has to be."""
        self._batch = (batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss, without waiting for its value."""
        self._losses.append((*self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop, or leave the step out, if a loss of this step or the gradients' norm is not finite."""
        losses, self._losses = self._losses, []
        watched = [loss.float() for *_, loss in losses]
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not has_scaler:
            watched += _gradient_norm(optimizer)
        if not watched:
            return
        values = torch.stack([value.to(watched[0].device) for value in watched]).tolist()
        fine = all(map(isfinite, values))
        # A step that one rank leaves out all have to; stopping needs no agreement.
        if self.skip and trainer.world_size > 1:
            fine_everywhere = trainer.strategy.reduce_boolean_decision(fine)
        else:
            fine_everywhere = fine
        if fine_everywhere:
            self._in_a_row = 0
            return
        told = "a loss or gradient of another rank is not finite"
        if not fine:
            told = _what_is_wrong(trainer, pl_module, losses, values)
        step = trainer.global_step + 1
        if self._in_a_row == self.skip:
            after = f" after {self.skip} were left out in a row" if self.skip else ""
            raise UserError(f"training stopped before optimizer step {step}{after}, the weights unchanged: {told}")
        self._in_a_row += 1
        self.skipped += 1
        rank_zero_info(f"NonFiniteGuard: optimizer step {step} is left out, {self.skipped} so far: {told}")
        pl_module.log("guard/skipped_steps", float(self.skipped))
        if not has_scaler:  # which leaves the step out itself
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were left out."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.skipped, self._in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])


def _what_is_wrong(
    trainer: pl.Trainer, pl_module: pl.LightningModule, losses: list[tuple[Any, int, Tensor]], values: list[float]
) -> str:
    bad = [kept for kept, value in zip(losses, values, strict=False) if not isfinite(value)]
    where = _bad_parameters(pl_module)
    if bad:
        batch, batch_idx, loss = bad[0]
        what = f"the loss of {_position(trainer, [bad[0]])} is {loss.item()}"
        return f"{what}; {where or _first_bad_output(trainer, pl_module, batch, batch_idx)}"
    what = f"the norm of the gradients is {values[-1]} after {_position(trainer, losses)}"
    return f"{what}; {where or _bad_gradients(pl_module)}"


def _position(trainer: pl.Trainer, batches: list[tuple[Any, int, Tensor]]) -> str:
    """Name batches, and the sequences of the training text that they hold."""
    first, last = batches[0][1], batches[-1][1]
    names = f"batch {first}" if first == last else f"batches {first} to {last}"
    held = [batch["sequence"] for batch, *_ in batches if isinstance(batch, Mapping) and "sequence" in batch]
    sequences = [str(number) for tensor in held for number in tensor.flatten().tolist()]
    of = f" (sequences {_listed(sequences)} of the training text)" if sequences else ""
    return f"{names} of epoch {trainer.current_epoch}{of}"


def _gradient_norm(optimizer: Optimizer) -> list[Tensor]:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return []
    norm = get_total_norm(gradients)
    # Of sharded gradients (FSDP2) this is a DTensor, whose value is spread over the ranks.
    return [(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()]


def _bad_parameters(pl_module: pl.LightningModule) -> str:
    names = [name for name, parameter in pl_module.named_parameters() if not _local(parameter).isfinite().all()]
    return f"not finite before this step: {_listed(names)}" if names else ""


def _bad_gradients(pl_module: pl.LightningModule) -> str:
    gradients = {name: _local(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None}
    names = [name for name, gradient in reversed(gradients.items()) if not gradient.isfinite().all()]
    if names:
        return f"the gradient is not finite, named from the loss on, in {_listed(names)}"
    largest = max(gradients, key=lambda name: float(gradients[name].abs().max()))
    return f"every gradient is finite, but their norm overflows; the largest is that of {largest}"


def _first_bad_output(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> str:
    if any(is_sharded(parameter) for parameter in pl_module.parameters()):
        # Ranks whose own loss is finite would not take part in gathering the weights.
        return "run the batch on one device to learn in which module, which sharded weights do not tell"
    first: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not first and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                first.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in pl_module.named_modules() if name]
    # The stop has to be told even where a second run of the batch fails.
    with suppress(Exception), torch.no_grad(), trainer.precision_plugin.train_step_context():
        takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        pl_module.training_step(*((batch, batch_idx) if takes_index else (batch,)))
    for handle in handles:
        handle.remove()
    if first:
        return f"run again, the first module whose output is not finite is {first[0]}"
    return "run again, the output of every module is finite: look at the loss, the batch's labels and a teacher, if any"


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor: to wait for other ranks while an error is told could be for ever."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
