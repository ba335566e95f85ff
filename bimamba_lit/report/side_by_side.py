"""Laying runs side by side.

Numbers of different texts, contexts or strides do not rank: such runs are refused. Runs that differ in nothing but
their seed are one row, of their means; ``config.yaml`` decides what differs, since two learning rates of one scheme
have the same summary but for the result.
"""

import json
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bimamba_lit.errors import UserError
from bimamba_lit.report.gap import gaps, students_in_full_precision
from bimamba_lit.report.summary import Summary, read_summary

MIB_BITS = 8 * 2**20


@dataclass(frozen=True)
class Row:
    """One run, or the mean of several that differ only in their seed.

    Attributes:
        name: The run's name, or what the names of several have in common; no two rows have the same.
        scheme: As in the summary.
        runs: The run folders.
        bits_per_byte: Mean over the runs.
        spread: Sample standard deviation of bits per byte; None of a single run.
        gap: Bits per byte less the teacher's; None where the teacher is not among the runs compared.
        gap_to_full_precision: Mean over the runs of bits per byte less those of a full-precision student trained alike
            (:mod:`bimamba_lit.report.gap`); None where there is none among the runs compared.
        gap_spread: Sample standard deviation of that gap; None of a single run.
        full_precision: The run folders of that student; none where there is none.
        perplexity: Mean over the runs.
        agreement: Share of positions where the likeliest token is the teacher's, 0 to 1; None where not measured.
        true_bits: Bits it takes to store the model.
        binarized_bits: Those of them that hold the binary layers; None where that was not written down.
        params: Weights of the model.
        binarized_params: Those of them in binary layers.
        tokens_seen: Tokens trained or calibrated on.
        seconds: Seconds of training or calibration.
        is_teacher: Whether it is the teacher of another row.
        tests: Bits per byte on other texts, mean and spread, by the texts' SHA-256.
        test_gaps: The gap to full precision on them, likewise.
    """

    name: str
    scheme: str
    runs: tuple[Path, ...]
    bits_per_byte: float
    spread: float | None
    gap: float | None
    gap_to_full_precision: float | None
    gap_spread: float | None
    full_precision: tuple[Path, ...]
    perplexity: float
    agreement: float | None
    true_bits: float
    binarized_bits: float | None
    params: int
    binarized_params: int
    tokens_seen: int
    seconds: float
    is_teacher: bool
    tests: dict[str, tuple[float, float | None]]
    test_gaps: dict[str, tuple[float, float | None]]

    @property
    def size_mib(self) -> float:
        """The true size in MiB (2**20 bytes)."""
        return self.true_bits / MIB_BITS

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, over the whole model."""
        return self.true_bits / self.params

    @property
    def bits_per_binarized_weight(self) -> float | None:
        """Bits a weight, over the binary layers: signs, scales, masks and all; None without such layers."""
        if self.binarized_bits is None or not self.binarized_params:
            return None
        return self.binarized_bits / self.binarized_params

    @property
    def binarized_share(self) -> float:
        """Share of the weights that are in binary layers, 0 to 1."""
        return self.binarized_params / self.params

    @property
    def trained(self) -> bool:
        """Whether it was trained as it is, rather than binarized and left so."""
        return not self.scheme.startswith("ptb.")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, best first.

    Attributes:
        rows: Sorted by bits per byte.
        eval_data: ``name`` and ``sha256`` of the text they were all evaluated on.
        context: Tokens of an evaluation window.
        stride: Tokens from one evaluation window to the next.
        tests: Names of the other texts that runs were measured on, by SHA-256.
    """

    rows: tuple[Row, ...]
    eval_data: dict[str, str]
    context: int
    stride: int
    tests: dict[str, str]


def lay_side_by_side(run_dirs: Sequence[str | Path]) -> Comparison:
    """Read the summaries of runs, fold those that differ only in their seed, and sort them.

    Raises:
        UserError: If a run is missing or unfinished, or the runs were evaluated on other texts, contexts or strides.
    """
    runs = {Path(folder).resolve(): Path(folder) for folder in run_dirs}
    if not runs:
        raise UserError("there is nothing to compare: name at least one run folder")
    summaries = {path: read_summary(folder) for path, folder in runs.items()}
    _refuse_unlike({runs[path]: summary for path, summary in summaries.items()})
    teachers = {path: _teacher_of(path, summaries) for path in summaries}
    configurations = {path: _configuration(path) for path in summaries}
    groups = _same_but_for_the_seed(summaries, configurations)
    students = students_in_full_precision(groups, summaries, configurations)
    rows = [_row(*of_one, runs, summaries, teachers) for of_one in zip(groups, students, strict=True)]
    rows.sort(key=lambda row: (math.isnan(row.bits_per_byte), row.bits_per_byte, row.size_mib, row.name))
    one = next(iter(summaries.values()))
    tests = {test.sha256: test.name for summary in summaries.values() for test in summary.tests}
    return Comparison(tuple(_distinct(rows)), dict(one.eval_data), one.context, one.stride, tests)


def _refuse_unlike(summaries: dict[Path, Summary]) -> None:
    facts: dict[str, Callable[[Summary], str]] = {
        "evaluation data": lambda s: f"{s.eval_data['name']} (SHA-256 {s.eval_data['sha256'][:12]})",
        "context": lambda s: str(s.context),
        "stride": lambda s: str(s.stride),
    }
    keys: dict[str, Callable[[Summary], str]] = {
        "evaluation data": lambda s: s.eval_data["sha256"],
        "context": facts["context"],
        "stride": facts["stride"],
    }
    told = []
    for fact, words in facts.items():
        values: dict[str, list[Path]] = defaultdict(list)
        for folder, summary in summaries.items():
            values[keys[fact](summary)].append(folder)
        if len(values) > 1:
            parts = (f"{words(summaries[f[0]])} of {', '.join(map(str, f))}" for f in values.values())
            told.append(f"{fact} ({'; '.join(parts)})")
    if told:
        raise UserError(
            f"these runs cannot be ranked, as they differ in {' and in '.join(told)}: "
            "evaluate them alike with `bimamba validate`, or compare them apart"
        )


def _teacher_of(path: Path, summaries: dict[Path, Summary]) -> Path | None:
    teacher = summaries[path].teacher
    if teacher is None:
        return None
    others = [other for other in summaries if other != path]
    target = Path(teacher).resolve()
    for other in others:
        if other == target or other in target.parents:
            return other
    # A path relative to the folder that training was started in, which need not be this one.
    named = [other for other in others if summaries[other].scheme == "fp" and other.name in Path(teacher).parts]
    return named[0] if len(named) == 1 else None


def _same_but_for_the_seed(summaries: dict[Path, Summary], configurations: dict[Path, Any]) -> list[list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path, summary in summaries.items():
        alike = [summary.scheme, summary.teacher, summary.params, summary.binarized_params]
        alike += [summary.tokens_seen, summary.version, configurations[path]]
        key = json.dumps(alike, sort_keys=True, default=str)
        # A second run with a seed that the row has already, or without a seed, is a row of its own.
        turn = 0
        while any(
            summary.seed is None or summaries[other].seed in (None, summary.seed)
            for other in groups.get(f"{turn} {key}", [])
        ):
            turn += 1
        groups.setdefault(f"{turn} {key}", []).append(path)
    return list(groups.values())


_OF_THE_RUN_ALONE = (
    "seed_everything",
    "seed",
    "default_root_dir",
    "logger",
    "checkpoint",
    "ckpt_path",
    "tests",
)
_WATCHERS = ("BitFlips", "WeightScales", "Samples", "Throughput", "NonFiniteGuard", "ProgressLines", "StepsBar")


def _configuration(run_dir: Path) -> Any:
    """Return what ``config.yaml`` says apart from seeds and places; None where there is none to read."""
    import yaml

    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None

    def apart_from_the_run(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: apart_from_the_run(v) for k, v in value.items() if k not in _OF_THE_RUN_ALONE}
        if isinstance(value, list):
            return [apart_from_the_run(part) for part in value if not _watches(part)] or None
        return value

    return apart_from_the_run(config)


def _watches(part: Any) -> bool:
    """Say whether a part of a list is a callback that only watches training, rather than changes it."""
    name = str(part.get("class_path", "")) if isinstance(part, dict) else ""
    return name.rpartition(".")[2] in _WATCHERS


def _row(
    group: list[Path],
    students: Sequence[Path],
    runs: dict[Path, Path],
    summaries: dict[Path, Summary],
    teachers: dict[Path, Path | None],
) -> Row:
    ran = [summaries[path] for path in group]
    results = {summary.seed: summary.bits_per_byte for summary in ran}
    to_full_precision = gaps(results, {summaries[path].seed: summaries[path].bits_per_byte for path in students})
    pairs = [(summaries[path], teachers[path]) for path in group]
    to_teacher = [summary.bits_per_byte - summaries[teacher].bits_per_byte for summary, teacher in pairs if teacher]
    tests, of_students = _tests(ran), _tests([summaries[path] for path in students])
    return Row(
        name=_common_name([summary.name for summary in ran]),
        scheme=ran[0].scheme,
        runs=tuple(runs[path] for path in group),
        bits_per_byte=statistics.fmean(results.values()),
        spread=_spread(list(results.values())),
        gap=_mean(to_teacher),
        gap_to_full_precision=_mean(to_full_precision),
        gap_spread=_spread(to_full_precision),
        full_precision=tuple(runs[path] for path in students),
        perplexity=statistics.fmean(summary.perplexity for summary in ran),
        agreement=_mean(summary.agreement for summary in ran if summary.agreement is not None),
        true_bits=statistics.fmean(summary.true_bits for summary in ran),
        binarized_bits=_mean(bits for summary in ran if (bits := summary.binarized_bits) is not None),
        params=ran[0].params,
        binarized_params=ran[0].binarized_params,
        tokens_seen=ran[0].tokens_seen,
        seconds=statistics.fmean(summary.seconds for summary in ran),
        is_teacher=any(path in teachers.values() for path in group),
        tests={text: _folded(list(by_seed.values())) for text, by_seed in tests.items()},
        test_gaps={text: _folded(gaps(tests[text], of_students[text])) for text in tests if text in of_students},
    )


def _tests(ran: list[Summary]) -> dict[str, dict[int | None, float]]:
    """Return bits per byte by seed on every text that all of the runs were measured on."""
    found = {summary.seed: {test.sha256: test.bits_per_byte for test in summary.tests} for summary in ran}
    texts = next(iter(found.values()), {})
    return {
        text: {seed: results[text] for seed, results in found.items()}
        for text in texts
        if all(text in results for results in found.values())
    }


def _folded(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), _spread(values)


def _spread(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(math.isfinite(value) for value in values) else math.nan


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return statistics.fmean(kept) if kept else None


def _common_name(names: list[str]) -> str:
    if len(set(names)) == 1:
        return names[0]
    return re.sub(r"[\W_]*(seed\d*)?[\W_]*$", "", os.path.commonprefix(names)) or names[0]


def _distinct(rows: list[Row]) -> Iterable[Row]:
    """Yield the rows, those of one name with the shortest end of their paths that tells them apart."""
    for row in rows:
        namesakes = [other.runs[0].resolve().parts for other in rows if other is not row and other.name == row.name]
        own = row.runs[0].resolve().parts
        depth = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in namesakes))
        tail = "/".join(own[-depth:])
        yield replace(row, name=f"{row.name} ({tail})" if tail != row.name else row.name) if namesakes else row
