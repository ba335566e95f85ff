"""Tuning one key for every setting of a grid alike: the same values, so the same number of trials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.report.summary import read_summary
from bimamba_lit.training.grid import Run, Setting, as_argument, plan, word


@dataclass(frozen=True)
class Tuning:
    """The key that is tuned and the values that are tried, such as ``model.optimizer.lr`` and 1e-3, 2e-3, 4e-3."""

    key: str
    values: tuple[Any, ...]

    def at(self, name: str, setting: Setting, value: Any) -> tuple[str, Setting]:
        """Return the name of a setting with the key at a value, and it."""
        return f"{name}-{word(self.key, value)}", {**setting, self.key: value}


@dataclass(frozen=True)
class Trials:
    """What tuning came to.

    Attributes:
        tuning: What was tried.
        results: Bits per byte of every setting by value; infinity where a trial did not come to its end.
    """

    tuning: Tuning
    results: Mapping[str, Mapping[Any, float]]

    def chosen(self, settings: Mapping[str, Setting]) -> dict[str, Setting]:
        """Return the settings at their best values, but those of which no trial came to its end."""
        best = {name: self.best(name) for name in settings}
        return dict(self.tuning.at(name, settings[name], value) for name, value in best.items() if value is not None)

    def best(self, name: str) -> Any:
        """Return the value of the least bits per byte; None if no trial came to its end."""
        results = {value: result for value, result in self.results[name].items() if math.isfinite(result)}
        return min(results, key=lambda value: results[value], default=None)

    def section(self) -> list[str]:
        """Return the lines of a report that say what was tried and what was chosen."""
        values = self.tuning.values
        lines = ["## Tuning", ""]
        lines.append(
            f"`{self.tuning.key}` was tuned for each setting with the same {len(values)} trials: bits per byte with "
            "the first seed on the text above, the value chosen in bold. A choice at either end of the values (\\*) "
            "may not be the best there is."
        )
        lines += ["", f"| Setting | {' | '.join(map(as_argument, values))} |", f"|:---{'|---:' * len(values)}|"]
        for name, results in self.results.items():
            cells = [self._cell(name, value, results[value]) for value in values]
            lines.append(f"| {name.replace('_', chr(92) + '_')} | {' | '.join(cells)} |")
        return lines

    def _cell(self, name: str, value: Any, result: float) -> str:
        if not math.isfinite(result):
            return "failed"
        if value != self.best(name):
            return f"{result:.3f}"
        return f"**{result:.3f}**" + ("\\*" if value in (self.tuning.values[0], self.tuning.values[-1]) else "")


def read_tuning(text: str) -> Tuning:
    """Read ``KEY=VALUE,VALUE,…``.

    Raises:
        UserError: If it is not that.
    """
    key, _, values = text.partition("=")
    try:
        read = tuple(yaml.safe_load(_number(value)) for value in values.split(",") if value)
    except yaml.YAMLError as error:
        raise UserError(f"--tune {text}: its values are no YAML ({' '.join(str(error).split())})") from error
    if not key or len(read) < 2 or len(set(map(str, read))) < len(read):
        raise UserError(f"--tune {text}: give a key and different values, as in model.optimizer.lr=1e-3,2e-3,4e-3")
    return Tuning(key, read)


def _number(text: str) -> str:
    """Return ``1e-3`` as YAML 1.1 knows it for a number: ``0.001``."""
    try:
        return repr(float(text)) if not text.lstrip("+-").isdecimal() else text
    except ValueError:
        return text


def trials(tuning: Tuning, settings: Mapping[str, Setting], seeds: Sequence[int]) -> list[Run]:
    """Return the runs that tuning takes: every setting at every value with the first seed."""
    tried = [tuning.at(name, setting, value) for name, setting in settings.items() for value in tuning.values]
    return plan(dict(tried), seeds[:1])


def read_trials(tuning: Tuning, settings: Mapping[str, Setting], seeds: Sequence[int], out: Path) -> Trials:
    """Return what the trials in the folders of ``out`` came to."""
    results: dict[str, dict[Any, float]] = {}
    for name, setting in settings.items():
        runs = trials(tuning, {name: setting}, seeds)
        results[name] = {value: _result(out / run.name) for value, run in zip(tuning.values, runs, strict=True)}
    return Trials(tuning, results)


def _result(folder: Path) -> float:
    return read_summary(folder).bits_per_byte if (folder / SUMMARY).is_file() else math.inf
