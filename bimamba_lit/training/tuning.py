"""Tuning one key for every setting of a grid alike: the same values, so the same number of trials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.report.markdown import escaped, markdown_table
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
        seeds: Of all runs, the first of which is the trials'; none where it is the recipe's.
    """

    tuning: Tuning
    results: Mapping[str, Mapping[Any, float]]
    seeds: Sequence[int]

    def chosen(self, settings: Mapping[str, Setting]) -> dict[str, Setting]:
        """Return the settings at their best values, but those of which no trial came to its end."""
        best = {name: self.best(name) for name in settings}
        return dict(self.tuning.at(name, settings[name], value) for name, value in best.items() if value is not None)

    def best(self, name: str) -> Any:
        """Return the value of the least bits per byte; None if no trial came to its end."""
        results = {value: result for value, result in self.results[name].items() if math.isfinite(result)}
        return min(results, key=lambda value: results[value], default=None)

    def at_the_edge(self) -> dict[str, str]:
        """Return the settings whose best value is the lowest or the highest tried, and which of the two it is.

        Values that are no numbers have no edge, and a value that does no better than the one beside it is at none.
        """
        if not all(isinstance(value, (int, float)) for value in self.tuning.values):
            return {}
        values = sorted(self.tuning.values)
        found = {}
        for name, results in self.results.items():
            for side, edge, beside in (("lowest", values[0], values[1]), ("highest", values[-1], values[-2])):
                if self.best(name) == edge and results[edge] < results[beside]:
                    found[name] = side
        return found

    def warnings(self) -> list[str]:
        """Return a sentence on each setting whose best value is at the edge of those tried."""
        tried = ", ".join(map(as_argument, self.tuning.values))
        return [
            f"{name}: its best {self.tuning.key}, {as_argument(self.best(name))}, is the {side} of those tried "
            f"({tried}), so a {'lower' if side == 'lowest' else 'higher'} one may be better"
            for name, side in self.at_the_edge().items()
        ]

    def section(self) -> list[str]:
        """Return the lines of a report that say what was tried and what was chosen."""
        values, edges = self.tuning.values, self.at_the_edge()
        first = f"seed {self.seeds[0]}" if self.seeds else "the recipe's seed"
        told = (
            f"`{self.tuning.key}` was tuned for each setting with the same {len(values)} trials, with {first} only: "
            "bits per byte on the text that the rows are sorted by, the value chosen in bold."
        )
        if self.seeds[1:]:
            others = ", ".join(map(str, self.seeds[1:]))
            told += (
                f" With the other seeds ({others}) only the chosen value was run; the chosen trial is one of its row."
            )
        if edges:
            told += " Of those marked \\* the best may lie outside of the values tried."
        rows = (
            [escaped(name), *(self._cell(name, value, results[value], name in edges) for value in values)]
            for name, results in self.results.items()
        )
        lines = ["## Tuning", "", told, "", *markdown_table(["Setting", *map(as_argument, values)], rows), ""]
        return [*lines, *(f"- **At the edge**: {escaped(warning)}." for warning in self.warnings()), ""]

    def _cell(self, name: str, value: Any, result: float, at_the_edge: bool) -> str:
        if not math.isfinite(result):
            return "failed"
        if value != self.best(name):
            return f"{result:.3f}"
        return f"**{result:.3f}**" + ("\\*" if at_the_edge else "")


def read_tuning(text: str) -> Tuning:
    """Read ``KEY=VALUE,VALUE,…``.

    Raises:
        UserError: If it is not that.
    """
    key, _, values = text.partition("=")
    try:
        read = tuple(yaml.safe_load(_number(value)) for value in values.split(",") if value)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
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
    return Trials(tuning, results, seeds)


def _result(folder: Path) -> float:
    return read_summary(folder).bits_per_byte if (folder / SUMMARY).is_file() else math.inf
