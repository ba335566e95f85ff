import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bimamba_lit.errors import UserError
from bimamba_lit.report import TextResult, lay_side_by_side

Run = Callable[..., Path]
OTHER_TEXT = {"name": "wikitext2", "sha256": "cd" * 32}


def test_rows_are_sorted_and_say_what_the_summaries_say(run: Run) -> None:
    comparison = lay_side_by_side(
        [run("b", bits_per_byte=3.0), run("c", bits_per_byte=math.nan), run("a", scheme="ptb.Sign", bits_per_byte=2.5)]
    )
    assert [row.name for row in comparison.rows] == ["a", "b", "c"]
    assert comparison.eval_data == {"name": "offline corpus, val", "sha256": "ab" * 32}
    assert (comparison.context, comparison.stride) == (256, 128)
    first, second, _ = comparison.rows
    assert (first.trained, second.trained) == (False, True)
    assert (second.bits_per_byte, second.spread, second.gap, second.perplexity) == (3.0, None, None, 13.4)
    assert (second.size_mib, second.bits_per_weight, second.binarized_share) == (1.0, 2**23 / 2e6, 0.75)
    assert (second.tokens_seen, second.seconds, second.agreement) == (2_048_000, 1300.0, 0.75)


def test_bits_a_binarized_weight_are_those_of_the_binary_layers_alone(run: Run) -> None:
    storage = {"signs": 1_500_000, "out_scale": 375_000, "full_precision": 8_000_000}
    told, untold, dense = (
        lay_side_by_side([run(name, **changes)]).rows[0]
        for name, changes in {
            "told": {"storage": storage, "true_bits": sum(storage.values())},
            "untold": {},
            "dense": {"storage": {"full_precision": 32_000_000}, "binarized_params": 0},
        }.items()
    )
    assert told.bits_per_binarized_weight == 1.25 and told.bits_per_weight == 9_875_000 / 2e6
    assert untold.bits_per_binarized_weight is None and dense.bits_per_binarized_weight is None


def test_seeds_fold_to_mean_and_spread(run: Run) -> None:
    config = "seed_everything: {0}\ntrainer:\n  default_root_dir: runs/fbi-seed{0}\ndata:\n  init_args: {{seed: {0}}}\n"
    results, agreements = [2.10, 2.16, 2.31], [0.7, None, 0.8]
    runs = [
        run(
            f"fbi-seed{seed}",
            config.format(seed),
            seed=seed,
            bits_per_byte=results[seed],
            perplexity=10.0 + seed,
            agreement=agreements[seed],
            seconds=100.0 * seed,
            true_bits=1000 + seed,
        )
        for seed in range(3)
    ]
    (row,) = lay_side_by_side(runs).rows
    assert row.name == "fbi"
    assert row.runs == tuple(runs)
    assert row.bits_per_byte == pytest.approx(statistics.mean(results))
    assert row.spread == pytest.approx(statistics.stdev(results))
    assert row.perplexity == 11.0
    assert row.agreement == pytest.approx(0.75)
    assert (row.seconds, row.true_bits) == (100.0, 1001.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "Sign"},
        {"tokens_seen": 5},
        {"version": "0.2.0"},
        {"teacher": "elsewhere"},
        {"seed": 0},  # the same seed: no other sample
        {"seed": None},
        {"config": "seed_everything: 1\nmodel: {lr: 0.2}\n"},
        {"config": None},
        {"config": "[" * 5000},
    ],
)
def test_runs_that_differ_in_more_do_not_fold(run: Run, changes: dict[str, Any]) -> None:
    one = run("one", "seed_everything: 0\nmodel: {lr: 0.1}\n", seed=0)
    alike = {"config": "seed_everything: 1\nmodel: {lr: 0.1}\n", "seed": 1}
    assert len(lay_side_by_side([one, run("two", **alike)]).rows) == 1
    assert len(lay_side_by_side([one, run("three", **{**alike, **changes})]).rows) == 2


def test_callbacks_that_only_watch_make_no_other_run(run: Run) -> None:
    config = "trainer:\n  callbacks: {}\n"
    watch = "[{class_path: bimamba_lit.callbacks.BitFlips}]"
    change = "[{class_path: bimamba_lit.callbacks.Progressive, init_args: {end_step: 5}}]"
    runs = [run("one", config.format("null"), seed=0), run("two", config.format(watch), seed=1)]
    assert len(lay_side_by_side(runs).rows) == 1
    assert len(lay_side_by_side([*runs, run("three", config.format(change), seed=2)]).rows) == 2


STUDENT = "model: {{teacher: t, loss: {0}, binarizer: {1}, optimizer: {{lr: {2}}}}}\nseed_everything: {3}\n"


def test_the_gap_to_full_precision_is_to_a_student_trained_alike_seed_by_seed(run: Run) -> None:
    def student(scheme: str, seed: int, result: float, loss: str = "ce", lr: float = 0.1, **changes: Any) -> Path:
        config = STUDENT.format(loss, "null" if scheme == "fp" else scheme, lr, seed)
        name = f"{scheme}-{loss}-{lr}-{seed}-{len(changes)}"
        changes = {"teacher": "t", "scheme": scheme, "seed": seed, "bits_per_byte": result, **changes}
        return run(name, config, **changes)

    runs = [student("fp", seed, result) for seed, result in [(0, 2.0), (1, 2.2)]]
    runs += [student("fp", 0, 2.5, lr=0.2)]  # of two students trained alike the better one counts
    runs += [student("FBI", seed, result, lr=0.3) for seed, result in [(0, 2.1), (1, 2.4), (2, 2.6)]]
    runs += [student("Sign", 0, 2.9, loss="kl"), student("ScaledSign", 0, 2.9, tokens_seen=7)]  # no such student
    rows = {(row.scheme, row.name): row for row in lay_side_by_side(runs).rows}
    assert len(rows) == 5
    (fbi,) = [row for row in rows.values() if row.scheme == "FBI"]
    assert fbi.full_precision == tuple(runs[:2])
    gaps = [2.1 - 2.0, 2.4 - 2.2, 2.6 - 2.1]
    assert fbi.gap_to_full_precision == pytest.approx(statistics.mean(gaps))
    assert fbi.gap_spread == pytest.approx(statistics.stdev(gaps))
    assert [row.gap_to_full_precision for row in rows.values() if row.scheme != "FBI"] == [None] * 4


def test_other_texts_fold_as_the_first_does(run: Run) -> None:
    def of(*results: float) -> tuple[TextResult, ...]:
        return tuple(TextResult(f"text {i}", f"{i}" * 64, value, 9.0) for i, value in enumerate(results))

    one, two = run("a-seed0", seed=0, tests=of(2.0, 3.0)), run("a-seed1", seed=1, tests=of(2.5))
    comparison = lay_side_by_side([one, two])
    assert comparison.tests == {"0" * 64: "text 0", "1" * 64: "text 1"}
    assert comparison.rows[0].tests == {"0" * 64: (2.25, pytest.approx(statistics.stdev([2.0, 2.5])))}


def test_the_gap_on_other_texts_is_to_the_same_student(run: Run) -> None:
    def student(scheme: str, seed: int, *results: float) -> Path:
        config = STUDENT.format("ce", "null" if scheme == "fp" else scheme, 0.1, seed)
        tests = tuple(TextResult(f"text {i}", f"{i}" * 64, value, 9.0) for i, value in enumerate(results))
        return run(f"{scheme}-{seed}", config, teacher="t", scheme=scheme, seed=seed, tests=tests)

    runs = [student("fp", 0, 2.0), student("fp", 1, 2.4), student("FBI", 0, 2.5, 9.0), student("FBI", 1, 3.5, 9.0)]
    (fbi,) = [row for row in lay_side_by_side(runs).rows if row.scheme == "FBI"]
    assert fbi.test_gaps == {"0" * 64: (pytest.approx(0.8), pytest.approx(statistics.stdev([0.5, 1.1])))}


def test_a_row_is_not_called_after_what_its_seeds_have_in_common(run: Run) -> None:
    (row,) = lay_side_by_side([run(f"fbi-seed1{i}", f"seed_everything: 1{i}", seed=10 + i) for i in range(2)]).rows
    assert row.name == "fbi"


def test_spread_of_a_diverged_seed_is_no_number(run: Run) -> None:
    (row,) = lay_side_by_side([run("a", seed=0), run("b", seed=1, bits_per_byte=math.inf)]).rows
    assert row.bits_per_byte == math.inf
    assert row.spread is not None and math.isnan(row.spread)


@pytest.mark.parametrize("inside", ["", "checkpoints/last.ckpt"])
def test_the_gap_is_to_the_runs_own_teacher(run: Run, tmp_path: Path, inside: str) -> None:
    good = run("good", scheme="fp", bits_per_byte=2.0, agreement=None)
    poor = run("poor", scheme="fp", bits_per_byte=2.5, tokens_seen=1)
    students = [
        run("of-good", bits_per_byte=2.25, teacher=str(good / inside)),
        run("of-poor", bits_per_byte=2.25, teacher=str(poor / inside), scheme="Sign"),
        run("of-absent", bits_per_byte=2.25, teacher=str(tmp_path / "absent"), scheme="ScaledSign"),
    ]
    rows = {row.name: row for row in lay_side_by_side([good, poor, *students]).rows}
    assert rows["of-good"].gap == pytest.approx(0.25)
    assert rows["of-poor"].gap == pytest.approx(-0.25)
    assert rows["of-absent"].gap is None
    assert [row.name for row in rows.values() if row.is_teacher] == ["good", "poor"]
    pupil = run("of-a-student", bits_per_byte=2.5, teacher=str(tmp_path / "of-good" / inside), scheme="GroupScale")
    rows = {row.name: row for row in lay_side_by_side([students[0], pupil]).rows}
    assert rows["of-a-student"].gap == pytest.approx(0.25) and rows["of-good"].is_teacher
    rows = {row.name: row for row in lay_side_by_side([good, poor, *students]).rows}
    assert all(rows[name].gap is None for name in ("good", "poor"))


def test_a_teachers_path_from_another_working_folder_is_known_by_its_name(run: Run) -> None:
    teacher = run("teacher", scheme="fp", bits_per_byte=2.0)
    student = run("student", bits_per_byte=2.5, teacher="runs/teacher/checkpoints/last.ckpt")
    assert lay_side_by_side([teacher, student]).rows[1].gap == pytest.approx(0.5)
    # Few bits in a folder of that name: no guess either.
    binary = run("other/teacher", scheme="ptb.Sign", bits_per_byte=1.0)
    assert all(row.gap is None for row in lay_side_by_side([binary, student]).rows)
    # Two folders of that name: no guess.
    namesake = run("more/teacher", scheme="fp", bits_per_byte=1.0, tokens_seen=1)
    assert all(row.gap is None for row in lay_side_by_side([teacher, namesake, student]).rows)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"eval_data": OTHER_TEXT},
            r"evaluation data \(offline corpus, val \(SHA-256 abababababab\) of .*one, .*two; wikitext2 .* of .*odd\)",
        ),
        ({"context": 512}, r"context \(256 of .*one, .*two; 512 of .*odd\)"),
        ({"stride": 256, "context": 512}, r"context \(.*\) and in stride \(128 of .*; 256 of .*odd\)"),
    ],
)
def test_runs_evaluated_otherwise_are_not_ranked(run: Run, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=rf"cannot be ranked, as they differ in {told}"):
        lay_side_by_side([run("one"), run("two"), run("odd", **changes)])


def test_a_text_of_another_name_is_the_same_text(run: Run) -> None:
    renamed = {"name": "a copy", "sha256": "ab" * 32}
    assert len(lay_side_by_side([run("one"), run("two", scheme="Sign", eval_data=renamed)]).rows) == 2


def test_namesakes_are_told_apart_by_their_folders(run: Run) -> None:
    runs = [run("a/fbi", name="fbi"), run("b/fbi", name="fbi"), run("c", name="fbi"), run("d", name="other")]
    names = {row.name for row in lay_side_by_side(runs).rows}
    assert names == {"fbi (a/fbi)", "fbi (b/fbi)", "fbi (c)", "other"}


def test_one_run_and_one_run_twice(run: Run) -> None:
    one = run("one")
    (row,) = lay_side_by_side([one]).rows
    assert row.name == "one"
    (twice,) = lay_side_by_side([one, one / ".." / "one"]).rows
    assert (twice.bits_per_byte, twice.spread) == (row.bits_per_byte, None)


def test_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="name at least one run folder"):
        lay_side_by_side([])
