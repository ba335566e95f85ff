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


def gaps_to_full_precision(
    groups: Sequence[Sequence[Path]], summaries: Mapping[Path, Summary], configurations: Mapping[Path, Any]
) -> list[list[float]]:
    """Return for each group of runs that differ only in their seed the runs' gaps, none where there is no such student.

    A run is paired with the full-precision student of its seed, or else with the mean over the seeds there are. Of
    several groups of such students, as of other learning rates, the best counts.

    Args:
        groups: The groups.
        summaries: Of every run.
        configurations: Of every run: its ``config.yaml`` without what is of that run alone; None where there is none.
    """
    students: dict[str, list[dict[int | None, float]]] = {}
    likeness = {path: _likeness(summaries[path], configurations[path]) for group in groups for path in group}
    for group in groups:
        key = likeness[group[0]]
        if key is not None and summaries[group[0]].scheme == "fp":
            results = {summaries[path].seed: summaries[path].bits_per_byte for path in group}
            students.setdefault(key, []).append(results)
    gaps: list[list[float]] = []
    for group in groups:
        key = likeness[group[0]]
        if key not in students or summaries[group[0]].scheme == "fp":
            gaps.append([])
            continue
        best = min(students[key], key=lambda results: statistics.fmean(results.values()))
        mean = statistics.fmean(best.values())
        gaps.append([summaries[p].bits_per_byte - best.get(summaries[p].seed, mean) for p in group])
    return gaps


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
