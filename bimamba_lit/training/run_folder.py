"""Choosing the folder a run lives in, so that no run overwrites another and none is resumed by accident.

A folder belongs to the configuration in its ``config.yaml``. What does not change the result (how long to train, where
and what to log, on which devices, what to test on, with how many data workers, whether activations are computed again)
does not make another configuration, so a run can go on longer than first planned; nor does the share of a batch that
each of more or fewer devices gets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.models.plain_pickle import load_plain
from bimamba_lit.models.sharded_folder import is_sharded
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.report.summary import read_summary
from bimamba_lit.training.checkpoint_file import newest_whole

CONFIG = "config.yaml"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"

_LEAST_SPACE = 1 << 16
"""Bytes that the files of a run that has just begun take at most."""

_RESULT_KEYS = ("seed_everything", "model", "data")
_TRAINER_RESULT_KEYS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)
_FREE_MODEL_KEYS = ("activation_checkpointing", "shard_teacher", "deploy")
"""What decides where and how a model is computed, and not what comes out."""


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
        UserError: If the run is finished, or has a checkpoint that was not asked for, or none that was, or a path is
            not there, or the folder cannot be written to.
    """
    folder = _first_free_or_own(base, config)
    _refuse_unwritable(folder)
    notice = None if folder == base else f"{base} holds a run of another configuration: this one goes to {folder}"
    last = folder / LAST_CHECKPOINT
    if command == "fit":
        _refuse_finished(folder, config)
    if ckpt_path == "last":
        newest, told = newest_whole(last.parent, last.name)
        told = told if notice is None else [notice, *told]
        if newest is None and command != "fit":
            raise UserError(
                f"there is no whole checkpoint to {command}: {'; '.join([*told, f'none is in {last.parent}'])}; "
                "give one with --ckpt_path PATH, or none to measure the model as the recipe builds it"
            )
        if newest is None:
            told.append(f"{folder} has no whole checkpoint yet: starting from the beginning")
        elif newest != last:
            told.append(f"going on from {newest}")
        return RunFolder(folder, newest, "; ".join(told) or None)
    if ckpt_path is not None:
        if not Path(ckpt_path).exists():
            siblings = [entry.name for entry in Path(ckpt_path).parent.glob("*.ckpt")]
            raise UserError(
                f"ckpt_path: there is no checkpoint {ckpt_path}"
                + (nearest(Path(ckpt_path).name, siblings) or "; give a file, or last for the newest of this run")
            )
        if command != "fit" or not last.exists() or last.samefile(ckpt_path):
            return RunFolder(folder, Path(ckpt_path), notice)
    if last.exists():
        if command == "fit":
            raise UserError(
                f"{folder} holds an unfinished run of this configuration: add --ckpt_path last to resume it, "
                "or choose another --trainer.default_root_dir"
            )
        raise UserError(
            f"{folder} holds a trained run of this configuration: add --ckpt_path last to {command} it, "
            "or choose another --trainer.default_root_dir"
        )
    return RunFolder(folder, None, notice)


def refuse_begun(folder: Path, config: dict[str, Any]) -> None:
    """Raise where, since it was chosen, a folder was taken by another run or this one has come to its end there.

    Raises:
        UserError: As it says.
    """
    if _first_free_or_own(folder, config) != folder:
        raise UserError(
            f"a run of another configuration has begun in {folder} at the same time: start this one again, and it "
            "goes to the next free folder"
        )
    _refuse_finished(folder, config)


def _first_free_or_own(base: Path, config: dict[str, Any]) -> Path:
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"trainer.default_root_dir: {folder} is a file, not a folder")
        if not (folder / CONFIG).exists() or _is_same_run(_read(folder / CONFIG), config):
            return folder
        number += 1


def _refuse_unwritable(folder: Path) -> None:
    """Raise if nothing could be written to ``folder``, before any training."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"trainer.default_root_dir: {folder} cannot be made, since {there} is a file, not a folder")
    try:
        with TemporaryFile(dir=there) as file:  # tells more than the access rights
            file.write(bytes(_LEAST_SPACE))
            file.flush()
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir: {folder} cannot be written to ({error.strerror}): "
            "give a folder in which you may write"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return {}  # whatever it is, it is not this run's
    return config if isinstance(config, dict) else {}


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer") or {}
    result = {key: config.get(key) for key in _RESULT_KEYS} | {"data": _deciding(config.get("data"))}
    result["model"] = _without(config.get("model"), _FREE_MODEL_KEYS)
    return result | {f"trainer.{key}": trainer.get(key) for key in _TRAINER_RESULT_KEYS}


def _deciding(data: Any) -> Any:
    """Return the data's settings that decide what is trained on.

    On any number of workers the order is the same, unless each reads a stream of its own.
    """
    settings = data.get("init_args") if isinstance(data, dict) else None
    cached = isinstance(settings, dict) and settings.get("streaming") is False
    return _without(data, ("test", "cache_dir", "workers") if cached else ("test", "cache_dir"))


def _without(part: Any, keys: Sequence[str]) -> Any:
    """Return a class and its settings without those of some keys."""
    settings = part.get("init_args") if isinstance(part, dict) else None
    if not isinstance(settings, dict):
        return part
    return {**part, "init_args": {key: value for key, value in settings.items() if key not in keys}}


def _is_same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether two configurations differ in nothing that decides the result."""
    ours, theirs = _identity(one), _identity(other)
    spread = ours | {"data": _of_all_devices(one)}, theirs | {"data": _of_all_devices(other)}
    return ours == theirs or spread[0] == spread[1]


def _of_all_devices(config: dict[str, Any]) -> Any:
    """Return the data's settings with the sequences of a batch on all devices together."""
    data, trainer = _deciding(config.get("data")), config.get("trainer") or {}
    settings: Any = data.get("init_args") if isinstance(data, dict) else None
    numbers: list[Any] = [count_devices(trainer.get("devices")), trainer.get("num_nodes") or 1]
    numbers.append(settings.get("batch_size") if isinstance(settings, dict) else None)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return data
    kept = {key: value for key, value in settings.items() if key != "eval_batch_size"}  # which changes no figure
    return {**data, "init_args": kept | {"batch_size": math.prod(numbers)}}


def count_devices(setting: Any) -> int | None:
    """Return how many devices ``trainer.devices`` names, as a number, indices or either as text; None if it names none.

    Raises:
        UserError: If it is none of these.
    """
    if isinstance(setting, list):
        return len(setting)
    text = str(setting).strip()
    try:
        count = len([int(index) for index in text.split(",") if index.strip()]) if "," in text else int(text)
    except ValueError:
        if setting in ("auto", None):
            return None
        raise UserError(
            f"trainer.devices: {setting!r} names no devices: give their number, their indices, or auto"
        ) from None
    return count if count > 0 else None


def _refuse_finished(folder: Path, config: dict[str, Any]) -> None:
    """Raise if the run in ``folder`` has come to its end and is not asked to go on longer."""
    if not (folder / SUMMARY).is_file() or not read_summary(folder).tokens_seen:
        return
    before = _read(folder / CONFIG)
    if not _ended(folder / LAST_CHECKPOINT, before):
        return
    if all(_length(config, key) <= _length(before, key) for key in ("max_steps", "max_epochs")):
        raise UserError(
            f"{folder} holds a finished run of this configuration: see {folder / SUMMARY}, choose another "
            "--trainer.default_root_dir, or train on with a longer --trainer.max_steps and --ckpt_path last"
        )


def _ended(checkpoint: Path, config: dict[str, Any]) -> bool:
    """Say whether a run with a summary is at its end: ``validate`` writes one for an unfinished run too."""
    length = _length(config, "max_steps")
    if not checkpoint.exists() or length == float("inf"):
        return True
    file = checkpoint / "meta.pt" if is_sharded(checkpoint) else checkpoint
    try:
        return int(load_plain(file, "another")["global_step"]) >= length
    except (UserError, TypeError, ValueError, LookupError):  # reading it as a checkpoint will tell
        return False


def _length(config: dict[str, Any], key: str) -> float:
    value = (config.get("trainer") or {}).get(key)
    return float("inf") if value is None or value < 0 else float(value)
