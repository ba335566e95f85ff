from collections.abc import Callable
from pathlib import Path

from bimamba_lit.report import TextResult, lay_side_by_side
from bimamba_lit.report.latex import write_latex

Run = Callable[..., Path]


def table(runs: list[Path], folder: Path) -> list[str]:
    write_latex(lay_side_by_side(runs), folder / "report.tex")
    return (folder / "report.tex").read_text().splitlines()


def test_a_row_a_run_with_spread_and_special_characters_escaped(run: Run, tmp_path: Path) -> None:
    runs = [run(f"my_run&{seed}", scheme="ptb.Sign", seed=seed, bits_per_byte=2.0 + seed / 10) for seed in (0, 1)]
    lines = table([*runs, run("other", bits_per_byte=3.0)], tmp_path)
    first, second = (line for line in lines if line.endswith(r"\\") and "Bits/byte" not in line)
    assert first == (r"  my\_run & ptb.Sign & \textbf{2.050 $\pm$ 0.071} & 2 & 1.00 & 4.19 & -- \\")
    assert second.startswith("  other & FBI & 3.000 & 1")


def test_it_is_whole_latex(run: Run, tmp_path: Path) -> None:
    text = "\n".join(table([run("a")], tmp_path))
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert text.count("{") == text.count("}")
    assert r"\begin{tabular}{llrrrrr}" in text


def test_the_best_is_neither_the_teacher_nor_in_full_precision(run: Run, tmp_path: Path) -> None:
    teacher = run("teacher", scheme="fp", bits_per_byte=1.0, binarized_params=0)
    dense = run("dense", scheme="fp", bits_per_byte=1.0, binarized_params=0, teacher=str(teacher))
    student = run("student", teacher=str(teacher))
    pupil = run("pupil", scheme="Sign", bits_per_byte=2.5, teacher=str(student))
    for rows in ([teacher, dense, student], [teacher, dense, student, pupil]):
        (bold,) = (line for line in table(rows, tmp_path) if "textbf" in line)
        assert bold.startswith("  student")
    (bold,) = (line for line in table([teacher, dense], tmp_path) if "textbf" in line)
    assert bold.startswith("  dense")


def test_other_texts_are_columns_by_their_names_and_whole_in_the_caption(run: Run, tmp_path: Path) -> None:
    lines = table([run("a", tests=(TextResult("test.txt, first 99 tokens", "c" * 64, 2.5, 9.0),))], tmp_path)
    (heading,) = (line for line in lines if "Bits/byte" in line)
    assert " & test.txt & True size (MiB) & " in heading
    assert any(" & 2.500 & " in line for line in lines)
    assert any("caption" in line and "test.txt, first 99 tokens" in line for line in lines)
