"""What binarization costs: bits per byte above a full-precision student of the same recipe, start, loss and tokens.

A student's distance to its teacher holds three things: what the text, the tokens and the start left undone, what the
loss asks for, and what binary weights cost. A full-precision student that is trained alike has all but the last.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bimamba_lit.report.summary import Summary

# What a full-precision student has not, or has of its own: a learning rate is tuned for each scheme.
_OF_BINARIZATION = ("binarizer", "targets", "keep_rows", "double_inputs", "deploy", "optimizer", "callbacks")


def students_in_full_precision(
    groups: Sequence[Sequence[Path]], summaries: Mapping[Path, Summary], configurations: Mapping[Path, Any]
) -> list[Sequence[Path]]:
    """Return for each group of runs that differ only in their seed that of its full-precision student, or an empty one.

    Of several groups of such students, as of other learning rates, the best counts.

    Args:
        groups: The groups.
        summaries: Of every run.
        configurations: Of every run: its ``config.yaml`` without what is of that run alone; None where there is none.
    """
    likeness = [_likeness(summaries[group[0]], configurations[group[0]]) for group in groups]
    full = [summaries[group[0]].scheme == "fp" for group in groups]
    students: dict[str, list[Sequence[Path]]] = {}
    for group, key, is_full in zip(groups, likeness, full, strict=True):
        if key is not None and is_full:
            students.setdefault(key, []).append(group)

    def mean(group: Sequence[Path]) -> float:
        return statistics.fmean(summaries[path].bits_per_byte for path in group)

    return [
        () if key is None or is_full else min(students.get(key, ()), key=mean, default=())
        for key, is_full in zip(likeness, full, strict=True)
    ]


def gaps(results: Mapping[int | None, float], of_students: Mapping[int | None, float]) -> list[float]:
    """Return what results are above those of full-precision students, both by seed.

    Each is paired with the student of its seed, or else with the mean of those there are.
    """
    if not of_students:
        return []
    mean = statistics.fmean(of_students.values())
    return [result - of_students.get(seed, mean) for seed, result in results.items()]


def _likeness(summary: Summary, configuration: Any) -> str | None:
    """Return what a student and its full-precision student have in common; None where that is not known."""
    if summary.teacher is None or configuration is None:
        return None

    def without_binarization(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_binarization(v) for k, v in value.items() if k not in _OF_BINARIZATION}
        return [without_binarization(part) for part in value] if isinstance(value, list) else value

    alike = [summary.teacher, summary.tokens_seen, without_binarization(configuration)]
    return json.dumps(alike, sort_keys=True, default=str)
