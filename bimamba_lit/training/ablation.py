"""Ablations: one recipe run over a grid of settings and seeds, one run after another, into one comparison.

Every run is a process of its own, so that one that fails or runs out of memory takes nothing with it, and every run is
what ``bimamba fit`` with the same settings is. What is finished is not run again; what was interrupted is resumed.

A grid is a YAML file: a mapping of settings to a value or to a list of values, of which all combinations are run, or a
list of such mappings, of which each is run. A value that is itself a list stands in a list: ``targets: [[in_proj]]``.
"""

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing
from bimamba_lit.report import Comparison, compare, print_comparison
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.training.recipe_read import read_recipe

RECORD = "ablation.yaml"
LOG = "log.txt"
_REASON_LINES = 20  # of a failed run's log, in which its last sentence is looked for

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

    def arguments(self, recipe: Path, folder: Path) -> list[str]:
        """Return the arguments after ``bimamba``."""
        args = ["fit", "-c", str(recipe)]
        args += [f"--{key}={_as_argument(value)}" for key, value in self.setting.items()]
        if self.seed is not None:
            args += [f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        return [*args, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]


def ablate(recipe: Path, grid: Path, seeds: Sequence[int], out: Path) -> Comparison:
    """Run every setting of a grid with every seed and lay the finished runs side by side in ``out``.

    Args:
        recipe: The recipe that all runs share.
        grid: The file of settings.
        seeds: The seeds; none takes the recipe's own.
        out: The folder of the runs' folders and of the report.

    Raises:
        UserError: If the recipe or the grid cannot be read, ``out`` holds the ablation of another recipe, or no run
            came to its end.
    """
    base = read_recipe(recipe)
    runs = plan(read_grid(grid), seeds)
    _claim(out, base)
    console = Console()
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        folder = out / run.name
        console.rule(f"[bold]{number} of {len(runs)}: {run.name}", align="left")
        if (folder / SUMMARY).is_file():
            console.print("finished already")
            continue
        reason = _run(run, recipe, folder)
        if reason is not None:
            failed[run.name] = reason
            console.print(f"failed: {reason}", style="bold red", highlight=False)
    finished = [out / run.name for run in runs if run.name not in failed]
    if not finished:
        raise UserError(f"no run of {grid} came to its end; the first failed so: {next(iter(failed.values()))}")
    comparison = compare(finished, out)
    console.rule(align="left")
    print_comparison(comparison)
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}; see {out / name / LOG}", highlight=False)
    return comparison


def read_grid(path: Path) -> list[Setting]:
    """Return the settings of a grid file, each a mapping of recipe keys to values.

    Raises:
        UserError: If the file is missing or no grid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"there is no grid {path}: give a YAML file of recipe keys and lists of values") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    blocks = content if isinstance(content, list) else [content]
    settings = []
    for block in blocks:
        if not isinstance(block, dict) or not all(isinstance(key, str) for key in block):
            raise UserError(f"{path} is no grid: it must map recipe keys such as model.optimizer.lr to lists of values")
        choices = [value if isinstance(value, list) else [value] for value in block.values()]
        if empty := [key for key, values in zip(block, choices, strict=True) if not values]:
            raise UserError(f"{path}: {empty[0]} has no value to take")
        settings += [dict(zip(block, values, strict=True)) for values in itertools.product(*choices)]
    if not settings:
        raise UserError(f"{path} is empty: it must map recipe keys to lists of values")
    return settings


def plan(settings: Sequence[Setting], seeds: Sequence[int]) -> list[Run]:
    """Return the runs, seeds innermost, each with a name of its own.

    Raises:
        UserError: If a setting or a seed stands there twice.
    """
    named: dict[str, Setting] = {}
    for setting in settings:
        name = _name(setting)
        if named.get(name, setting) != setting:
            name = f"{name}-{sum(other.startswith(name) for other in named) + 1}"
        if name in named:
            raise UserError(f"the grid holds the setting {name} twice")
        named[name] = setting
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds names a seed twice: {','.join(map(str, seeds))}")
    if not seeds:
        return [Run(name, setting, None) for name, setting in named.items()]
    return [Run(f"{name}-seed{seed}", setting, seed) for name, setting in named.items() for seed in seeds]


def _name(setting: Setting) -> str:
    parts = []
    for key, value in setting.items():
        last = key.removesuffix(".class_path").rpartition(".")[2]
        text = value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else _as_argument(value)
        parts.append(f"{last}-{re.sub(r'[^A-Za-z0-9.+-]+', '_', str(text)).strip('_')}")
    return "-".join(parts)


def _as_argument(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()


def _claim(out: Path, base: dict[str, Any]) -> None:
    """Make ``out`` the folder of this recipe's ablation, or raise if it is another's."""
    record = out / RECORD
    if record.is_file():
        if yaml.safe_load(record.read_text(encoding="utf-8")) != base:
            raise UserError(f"{out} holds an ablation of another recipe: choose another --out")
        return
    with replacing(record) as temporary:
        temporary.write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")


def _run(run: Run, recipe: Path, folder: Path) -> str | None:
    """Run one, show and keep what it prints, and return why it failed, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bimamba_lit", *run.arguments(recipe, folder)]
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 0:
        return None
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()[-_REASON_LINES:]
    said = [line.removeprefix("bimamba: ") for line in lines if line.startswith("bimamba: ")]
    return said[-1] if said else f"exit code {process.returncode}"
