"""Whether a checkpoint's training state is of the kind that this run would write.

Lightning and torch put much of what a checkpoint holds into place without looking at it, and fail steps later where it
is used. So it is compared with the state of this run before the first step: the same keys, kinds and shapes.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bimamba_lit.errors import UserError

_FREE = ("state_dict", "epoch_loop.val_loop.state_dict")  # the loaders' own, who read it before the first batch


def check_loops(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Hold a checkpoint's progress to that of the trainer.

    Raises:
        UserError: If it is of another kind.
    """
    loops = checkpoint.get("loops")
    found = loops.get("fit_loop") if isinstance(loops, Mapping) else None
    expected = trainer.fit_loop.state_dict()
    if isinstance(found, Mapping):
        expected = {key: value for key, value in expected.items() if key not in _FREE}
        found = {key: value for key, value in found.items() if key not in _FREE}
    _compare("loops.fit_loop", expected, found)


def check_paths(state: Mapping[str, Any]) -> None:
    """Hold what a callback that saves checkpoints remembers of its files to what it can be: text.

    Raises:
        UserError: If it is something else.
    """
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        _compare(f"callbacks.{name}", "last.ckpt", state.get(name, ""))


def check_optimizers(trainer: pl.Trainer, fresh: Mapping[str, Any]) -> None:
    """Hold the optimizer and its schedule, as a checkpoint left them, to fresh ones.

    Args:
        trainer: After it has restored them.
        fresh: What ``configure_optimizers`` returns.

    Raises:
        UserError: If they are of another kind.
    """
    (optimizer,) = trainer.optimizers
    settings = [
        [{key: value for key, value in group.items() if key != "params"} for group in one.param_groups]
        for one in (fresh["optimizer"], optimizer)
    ]
    _compare("optimizer_states.param_groups", *settings)
    for fresh_group, group in zip(*settings, strict=True):
        for key, switch in fresh_group.items():
            if isinstance(switch, bool) and group[key] is not switch:
                _refuse(f"optimizer_states.param_groups.{key}", f"is {group[key]} where {switch} belongs")
    for parameter, state in optimizer.state.items():
        expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        _compare("optimizer_states.state", expected, state)
    schedules = fresh["lr_scheduler"]["scheduler"], trainer.lr_scheduler_configs[0].scheduler
    _compare("lr_schedulers", *(vars(schedule) for schedule in schedules))


def _compare(path: str, expected: Any, found: Any) -> None:
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            _refuse(path, f"is no mapping but {_told(found)}")
        if differing := expected.keys() ^ found.keys():
            name = sorted(map(str, differing))[0]
            _refuse(path, f"{'lacks' if name in map(str, expected) else 'has the unknown'} {name}")
        for key, value in expected.items():
            _compare(f"{path}.{key}", value, found[key])
    elif isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape or found.is_complex():
            _refuse(path, f"is {_told(found)} where a tensor of shape {tuple(expected.shape)} belongs")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            _refuse(path, f"is {_told(found)} where a list of {len(expected)} belongs")
        for place, (one, other) in enumerate(zip(expected, found, strict=True)):
            _compare(f"{path}[{place}]", one, other)
    elif isinstance(expected, bool | int | float | str) and not _is_alike(expected, found):
        _refuse(path, f"is {_told(found)} where a value such as {expected!r} belongs")
    elif expected is None and not isinstance(found, bool | int | float | None):
        _refuse(path, f"is {_told(found)} where nothing belongs")


def _is_alike(expected: bool | int | float | str, found: Any) -> bool:
    if isinstance(expected, bool) or isinstance(found, bool):
        return isinstance(expected, bool) and isinstance(found, bool)
    if isinstance(expected, float):
        return isinstance(found, int | float)
    return isinstance(found, type(expected)) and not (isinstance(found, int) and abs(found) >= 1 << 63)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, bool | int | float | None) else f"a {type(value).__name__}"


def _refuse(path: str, what: str) -> None:
    raise UserError(f"the checkpoint cannot be gone on with: its {path} {what}; it is damaged or of another version")
