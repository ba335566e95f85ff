"""Choosing the folder a run lives in, so that no run overwrites another and none is resumed by accident.

A folder belongs to the configuration in its ``config.yaml``. What does not change the result (how long to train, where
and what to log, on which devices) does not make another configuration, so a run can go on longer than first planned.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bimamba_lit.errors import UserError

CONFIG = "config.yaml"
SUMMARY = "summary.json"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"

_RESULT_KEYS = ("seed_everything", "model", "data")
_TRAINER_RESULT_KEYS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run goes and what it starts from.

    Attributes:
        path: The folder.
        checkpoint: The checkpoint to load, or ``None`` to start from the beginning.
        notice: A sentence for the user when the folder or the start is not what was asked for.
    """

    path: Path
    checkpoint: Path | None = None
    notice: str | None = None


def choose_run_folder(base: Path, config: dict[str, Any], command: str, ckpt_path: str | None) -> RunFolder:
    """Choose the folder for a run.

    Args:
        base: The folder asked for; where it holds a run of another configuration, the next free sibling is taken.
        config: The configuration as ``config.yaml`` holds it.
        command: ``fit``, ``validate`` or ``test``.
        ckpt_path: A checkpoint's path, ``last`` for the newest of this run, or ``None``.

    Raises:
        UserError: If the run is finished, or has a checkpoint that was not asked for, or a path is not there.
    """
    folder = _first_free_or_own(base, config)
    notice = None if folder == base else f"{base} holds a run of another configuration: this one goes to {folder}"
    last = folder / LAST_CHECKPOINT
    if ckpt_path == "last":
        if last.is_file():
            if command == "fit":
                _refuse_finished(folder, config)
            return RunFolder(folder, last, notice)
        start = f"{folder} has no whole checkpoint yet: starting from the beginning"
        return RunFolder(folder, None, f"{notice}; {start}" if notice else start)
    if ckpt_path is not None:
        if not Path(ckpt_path).is_file():
            raise UserError(f"ckpt_path: there is no checkpoint {ckpt_path}")
        return RunFolder(folder, Path(ckpt_path), notice)
    if last.is_file():
        if command == "fit":
            _refuse_finished(folder, config)
            raise UserError(
                f"{folder} holds an unfinished run of this configuration: add --ckpt_path last to resume it, "
                "or choose another --trainer.default_root_dir"
            )
        raise UserError(
            f"{folder} holds a trained run of this configuration: add --ckpt_path last to {command} it, "
            "or choose another --trainer.default_root_dir"
        )
    return RunFolder(folder, None, notice)


def _first_free_or_own(base: Path, config: dict[str, Any]) -> Path:
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"trainer.default_root_dir: {folder} is a file, not a folder")
        if not (folder / CONFIG).exists() or _identity(_read(folder / CONFIG)) == _identity(config):
            return folder
        number += 1


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # whatever it is, it is not this run's
    return config if isinstance(config, dict) else {}


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer") or {}
    result = {key: config.get(key) for key in _RESULT_KEYS}
    return result | {f"trainer.{key}": trainer.get(key) for key in _TRAINER_RESULT_KEYS}


def _refuse_finished(folder: Path, config: dict[str, Any]) -> None:
    """Raise if the run in ``folder`` has its summary and no further steps are asked for."""
    if not (folder / SUMMARY).is_file():
        return
    done = _steps(_read(folder / CONFIG))
    asked = _steps(config)
    if asked <= done:
        raise UserError(
            f"{folder} holds a finished run of this configuration: see `bimamba compare {folder}`, "
            "or choose another --trainer.default_root_dir to run it again"
        )


def _steps(config: dict[str, Any]) -> float:
    steps = (config.get("trainer") or {}).get("max_steps", -1)
    return float("inf") if steps is None or steps < 0 else float(steps)
