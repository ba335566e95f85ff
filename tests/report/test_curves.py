import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bimamba_lit.report import compare, lay_side_by_side
from bimamba_lit.report.curves import write_curves

Run = Callable[..., Path]


def log(folder: Path, rows: list[dict[str, float]], cut: str = "") -> Path:
    columns = list(rows[0])
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    (folder / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines) + cut)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Every curve of the last picture that was saved, by panel and run."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        for axes in figure.axes:
            lines = {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
            found[axes.get_title(loc="left")] = lines
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_flips_and_scales_are_drawn_as_they_were_logged(run: Run, drawn: Any, tmp_path: Path) -> None:
    """Two seeds of one run are averaged, layers too; rows between two logs and a cut-off last row count for nothing."""

    def rows(flips: float, scale: float) -> list[dict[str, float]]:
        first = {"step": 4, "train/loss": 3.0, "flips/rate": flips, "flips/since_start": flips / 2}
        first |= {"scales/a/mean": scale, "scales/b/mean": 2.0, "scales/a/near_zero": 0.5, "scales/b/near_zero": 0.0}
        return [first, {"step": 5, "train/loss": 2.0}, first | {"step": 9, "scales/a/mean": 2 * scale}]

    config = "seed_everything: {0}\n"
    runs = [
        log(run("fbi-seed0", config.format(0), seed=0), rows(0.1, 1.0)),
        log(run("fbi-seed1", config.format(1), seed=1), rows(0.3, 3.0), cut="14,2.0,0."),
        run("teacher", scheme="fp"),
    ]
    compare(runs, tmp_path / "out")
    assert drawn["signs changed since the last log, share"]["fbi"] == [(5, 0.2), (10, 0.2)]
    assert drawn["signs changed since the start, share"]["fbi"] == [(5, 0.1), (10, 0.1)]
    assert drawn["scales near zero, share"]["fbi"] == [(5, 0.25), (10, 0.25)]
    assert drawn["mean scale, share of the first logged"]["fbi"] == [(5, 1.0), (10, 1.5)]
    assert matplotlib.image.imread(tmp_path / "out" / "curves.png").std() > 0.01
    assert "(curves.png)" in (tmp_path / "out" / "report.md").read_text()


def test_what_was_logged_once_is_a_point(run: Run, tmp_path: Path) -> None:
    def inked(rows: list[dict[str, float]]) -> int:
        compare([log(run("fbi"), rows)], tmp_path / "out")
        blue = matplotlib.image.imread(tmp_path / "out" / "curves.png")[150:, :, :3]  # below the legend
        return int((abs(blue - [0x1F / 255, 0x5F / 255, 0xA8 / 255]).sum(-1) < 0.05).sum())

    row = {"step": 4, "flips/rate": 0.1, "flips/since_start": 0.1}
    assert inked([row]) > 20
    assert inked([row, row | {"step": 9}]) > 20


def test_without_logged_signs_there_is_no_picture_not_even_an_old_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curves.png").touch()
    compare([log(run("teacher", scheme="fp"), [{"step": 0, "train/loss": math.pi}])], tmp_path / "out")
    assert not (tmp_path / "out" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_panel_of_what_was_not_logged_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the flips of a run that is shorter than BitFlips waits."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (saved.append(figure), Path(path).touch()))
    write_curves(lay_side_by_side([log(run("fbi"), [{"step": 1, "scales/a/mean": 1.0}])]), tmp_path / "curves.png")
    told = {axes.get_title(loc="left"): [text.get_text() for text in axes.texts] for axes in saved[0].axes}
    assert told == {
        "signs changed since the last log, share": ["not logged"],
        "signs changed since the start, share": ["not logged"],
        "mean scale, share of the first logged": [],
        "scales near zero, share": ["not logged"],
    }


def test_of_many_runs_the_best_are_drawn(run: Run, drawn: Any, tmp_path: Path) -> None:
    runs = [
        log(run(f"r{i}", seed=i, scheme=f"S{i}", bits_per_byte=3 - i / 10), [{"step": 0, "flips/rate": 0.1}])
        for i in range(8)
    ]
    compare(runs, tmp_path / "out")
    (names,) = {tuple(lines) for title, lines in drawn.items() if "last log" in title}
    assert names == ("r7", "r6", "r5", "r4", "r3", "r2")


def test_those_chosen_are_all_drawn_each_in_a_style_of_its_own(run: Run, drawn: Any, tmp_path: Path) -> None:
    runs = [
        log(run(f"r{i}", seed=i, scheme=f"S{i}", bits_per_byte=3 - i / 100), [{"step": 0, "flips/rate": 0.1}])
        for i in range(20)
    ]
    styles = set()
    plot = Axes.plot

    def keep(axes: Axes, *args: Any, **options: Any) -> Any:
        styles.add((options["color"], options["linestyle"]))
        return plot(axes, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", keep)
        assert write_curves(lay_side_by_side(runs), tmp_path / "curves.png", set(runs[:15]))
    (names,) = {tuple(lines) for title, lines in drawn.items() if "last log" in title}
    assert names == tuple(f"r{i}" for i in reversed(range(15))) and len(styles) == 15
