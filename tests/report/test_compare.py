import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bimamba_lit.errors import UserError
from bimamba_lit.report import TextResult, compare, print_comparison
from bimamba_lit.report.table import count, duration, figure, gap_text, shortened

Run = Callable[..., Path]
MIB = 8 * 2**20


@pytest.fixture
def runs(run: Run) -> list[Path]:
    teacher = run("teacher", scheme="fp", bits_per_byte=2.04, true_bits=int(5.4 * MIB), agreement=None, seconds=90000.0)
    student = {"teacher": str(teacher), "true_bits": int(0.9 * MIB)}
    return [
        run("sign|untrained", scheme="ptb.Sign", bits_per_byte=6.3, perplexity=1.6e8, tokens_seen=0, **student),
        *(run(f"fbi-{seed}", seed=seed, bits_per_byte=2.16 + 0.02 * seed, **student) for seed in (0, 1)),
        teacher,
    ]


def test_the_report_in_files(runs: list[Path], tmp_path: Path) -> None:
    comparison = compare(runs, tmp_path / "out" / "deep")
    folder = tmp_path / "out" / "deep"
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.csv", "report.tex", "report.png"}
    text = (folder / "report.md").read_text()
    assert "**offline corpus, val** (SHA-256 abababababab), context 256, stride 128" in text
    assert "![Bits per byte against true size](report.png)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["teacher", "fbi", "sign\\|untrained"]
    assert rows[0].startswith("| teacher | fp (teacher) | 2.040 | 1 | – | 13.4 | – | 5.40 |")
    assert rows[1].startswith(
        "| fbi | FBI | 2.170 ± 0.014 | 2 | +0.130 | 13.4 | 75.0% | 0.900 | 3.77 | – | 75.0% | 2.05M |"
    )
    assert "| +4.260 | 1.6e8 |" in rows[2]
    with (folder / "report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["bits_per_byte"]) for row in table] == [row.bits_per_byte for row in comparison.rows]
    assert [row["seeds"] for row in table] == ["1", "2", "1"]
    assert [row["agreement"] for row in table] == ["", "0.75", "0.75"]
    assert table[1]["runs"] == f"{runs[1]} {runs[2]}"


def test_runs_that_do_not_rank_leave_no_file(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be ranked"):
        compare([run("one"), run("two", context=3)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_the_table_fits_the_terminal(runs: list[Path], run: Run, tmp_path: Path, width: int) -> None:
    long = run("a-name-that-nobody-should-have-chosen-for-a-run-folder-but-did-12", scheme="Sign", bits_per_byte=2.2)
    console = Console(width=width, record=True, file=(tmp_path / "terminal").open("w"))
    comparison = compare([*runs, long], tmp_path / "out")
    print_comparison(comparison, console)
    console.file.close()
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert any(line.lstrip().startswith("a-") for line in lines)
    # Whatever has to go, the result and what it is a result of stay whole.
    if width >= 60:
        for texts in (("teacher", "fp (teacher)", "2.040"), ("fbi", "FBI", "2.170 ± 0.014"), ("ptb.Sign", "6.300")):
            assert any(all(text in line for text in texts) for line in lines)
    if width >= 80:
        assert any("+0.130" in line and "0.900" in line for line in lines)
    left_out = next((line for line in lines if line.startswith("Left out")), "")
    header = next(line for line in lines if "bits/byte" in line and "scheme" in line)
    for column in ("gap", "ppl", "agree", "bits/w", "1-bit", "tokens", "time"):
        assert (column in header) != (column in " ".join(lines[lines.index(left_out) :]) if left_out else False)
    assert bool(left_out) == (width < 140)


def test_one_run_makes_a_report(run: Run, tmp_path: Path) -> None:
    compare([run("one", agreement=None)], tmp_path)
    assert "| one | FBI | 2.160 | 1 | 13.4 |" in (tmp_path / "report.md").read_text()


def test_the_report_needs_no_lightning_and_matplotlib_only_to_draw() -> None:
    code = (
        "import sys, bimamba_lit.report; "
        "print([name for name in ('lightning', 'matplotlib', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numbers_for_people() -> None:
    values = [0.0, 0.9, 5.4, 13.44, 152.5, 1204.4, 1.6e8, 1e-4, float("inf")]
    assert [figure(v) for v in values] == ["0.000", "0.900", "5.40", "13.4", "152.5", "1,204", "1.6e8", "1.0e-4", "inf"]
    assert [gap_text(v, None) for v in (-4e-6, 4e-6, -0.0125, None)] == ["+0.000", "+0.000", "-0.013", "–"]
    assert [count(v) for v in (0, 950, 2_048_000, 102e6, 3.2e9)] == ["0", "950", "2.05M", "102M", "3.20B"]
    assert [duration(v) for v in (4, 119, 1300, 9000, 200_000)] == ["4 s", "119 s", "22 min", "2.5 h", "2.3 d"]
    assert [shortened("fbi-seed12", n) for n in (10, 7)] == ["fbi-seed12", "fbi…d12"]


def test_what_binarization_costs_on_every_text_stands_beside_the_student_it_is_measured_from(
    run: Run, tmp_path: Path
) -> None:
    def student(name: str, scheme: str, start: str, result: float) -> Path:
        config = f"model: {{teacher: t, student: {start}, binarizer: {scheme}}}\n"
        tests = (TextResult("other_text", "c" * 64, result + 1, 9.0),)
        return run(name, config, teacher="t", scheme=scheme, bits_per_byte=result, tests=tests)

    runs = [student("full", "fp", "teacher", 2.0), student("full-scratch", "fp", "null", 2.5)]
    runs += [student("fbi", "FBI", "teacher", 2.125), student("fbi-scratch", "FBI", "null", 2.75)]
    compare(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| fbi | full | 1 | +0.125 | +0.125 |\n| fbi-scratch | full-scratch | 1 | +0.250 | +0.250 |\n" in text
    assert "Gap on offline corpus, val | Gap on other\\_text |" in text
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert float(table["fbi-scratch"]["other_text gap_to_full_precision"]) == 0.25
    assert table["fbi"]["full_precision"] == str(runs[0]) and table["full"]["full_precision"] == ""


def test_names_that_are_shortened_still_tell_rows_apart(run: Run, tmp_path: Path) -> None:
    names = [f"full_precision_{kind}-lr-0.008" for kind in ("scratch", "equal_bytes", "of_the_teacher")]
    runs = [run(name, scheme="fp", bits_per_byte=2.0, params=5 + i) for i, name in enumerate(names)]
    console = Console(width=70, record=True, file=(tmp_path / "terminal").open("w"))
    print_comparison(compare(runs, tmp_path / "out"), console)
    console.file.close()
    shown = [line.split()[0] for line in console.export_text().splitlines() if "lr-0.008" in line]
    assert len(set(shown)) == 3 and any("…" in name for name in shown)
