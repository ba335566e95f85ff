"""Grids of settings, and the runs they come to.

A grid is a YAML file: a mapping of settings to a value or to a list of values, of which all combinations are run, or a
list of such mappings, of which each is run. A value that is itself a list stands in a list: ``targets: [[in_proj]]``.
``name`` is no setting but what the runs of a mapping are called.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.training.run_folder import LAST_CHECKPOINT

Setting = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of an ablation.

    Attributes:
        name: The name of its folder: what its settings change, and its seed.
        setting: Recipe keys and values.
        seed: Of weights, draws and the order of the data; None takes the recipe's.
    """

    name: str
    setting: Setting
    seed: int | None

    def arguments(self, shared: Sequence[str], folder: Path) -> list[str]:
        """Return the arguments after ``bimamba``, those that all runs share first; a run that has begun is resumed."""
        args = ["fit", *shared]
        args += [f"--{key}={as_argument(value)}" for key, value in self.setting.items()]
        if self.seed is not None:
            args += [f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        args.append(f"--trainer.default_root_dir={folder}")
        return [*args, "--ckpt_path=last"] if (folder / LAST_CHECKPOINT.parent).is_dir() else args


def find_grid(name: str) -> Path:
    """Return the path of a grid: a file, or one that comes with the package by its name, such as ``schemes``.

    Raises:
        UserError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = {entry.name: entry for entry in files("bimamba_lit").joinpath("grids").iterdir()}
    if (entry := known.get(f"{name}.yaml")) is not None:
        return Path(str(entry))
    ours = sorted(other.removesuffix(".yaml") for other in known)
    hint = nearest(name, ours) or f": give a YAML file of recipe keys and lists of values, or one of {', '.join(ours)}"
    raise UserError(f"there is no grid {name}{hint}")


def read_grid(path: Path) -> dict[str, Setting]:
    """Return the settings of a grid file by their names, each a mapping of recipe keys to values.

    Raises:
        UserError: If the file cannot be read, is no grid, or holds a setting or a name twice.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the grid {path}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    settings: dict[str, Setting] = {}
    for block in content if isinstance(content, list) else [content]:
        if not isinstance(block, dict) or not all(isinstance(key, str) for key in block):
            raise UserError(f"{path} is no grid: it must map recipe keys such as model.optimizer.lr to lists of values")
        for name, setting in _combinations(block, path):
            if setting in settings.values():
                raise UserError(f"{path} holds the setting {name} twice")
            names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
            settings[next(one for one in names if one not in settings)] = setting
    if not settings:
        raise UserError(f"{path} is empty: it must map recipe keys to lists of values")
    return settings


def _combinations(block: Mapping[str, Any], path: Path) -> list[tuple[str, Setting]]:
    keys = [key for key in block if key != "name"]
    choices = [block[key] if isinstance(block[key], list) else [block[key]] for key in keys]
    if empty := [key for key, values in zip(keys, choices, strict=True) if not values]:
        raise UserError(f"{path}: {empty[0]} has no value to take")
    told = [key for key, values in zip(keys, choices, strict=True) if len(values) > 1] if "name" in block else keys
    combinations = [dict(zip(keys, values, strict=True)) for values in itertools.product(*choices)]
    own = [_words(block["name"])] if "name" in block else []
    return [("-".join([*own, *(word(key, setting[key]) for key in told)]), setting) for setting in combinations]


def plan(settings: Mapping[str, Setting], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of named settings, seeds innermost; no seed takes the recipe's.

    Raises:
        UserError: If a seed stands there twice.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds names a seed twice: {','.join(map(str, seeds))}")
    if not seeds:
        return [Run(name, setting, None) for name, setting in settings.items()]
    return [Run(f"{name}-seed{seed}", setting, seed) for name, setting in settings.items() for seed in seeds]


def word(key: str, value: Any) -> str:
    """Return a setting as a part of a run's name: ``lr-0.001``."""
    last = key.removesuffix(".class_path").rpartition(".")[2]
    text = value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else as_argument(value)
    return f"{last}-{_words(text) or 'none'}"


def _words(text: object) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", str(text)).strip("_")


def as_argument(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()
