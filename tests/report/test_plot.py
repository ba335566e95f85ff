import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from bimamba_lit.report import lay_side_by_side
from bimamba_lit.report.plot import write_plot

Run = Callable[..., Path]
Draw = Callable[[list[Path]], Figure]
MIB = 2**23


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw runs and return the figure that was written."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))

    def written(runs: list[Path]) -> Figure:
        write_plot(lay_side_by_side(runs), tmp_path / "report.png")
        width, height = drawn[-1].get_size_inches()
        assert imread(tmp_path / "report.png").shape == (int(150 * height), int(150 * width), 4)
        return drawn[-1]

    return written


def lines_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


@pytest.mark.parametrize(
    ("results", "sizes", "spans"),
    [
        ([2.16], [0.9], ("linear", "linear")),
        ([2.04, 2.16, 2.2], [3.0, 0.9, 0.9], ("linear", "linear")),
        ([2.04, 2.16, 6.3], [3.0, 0.9, 0.9], ("linear", "log")),
        ([0.9, 1.1, 1.2], [5000.0, 500.0, 20.0], ("log", "linear")),
        ([2.04, math.inf], [5.4, 0.9], ("linear", "linear")),
        ([math.nan], [0.9], ("linear", "linear")),
    ],
)
def test_few_runs_are_points_of_a_plane(
    run: Run, draw: Draw, results: list[float], sizes: list[float], spans: tuple[str, str]
) -> None:
    schemes = ["fp", *["ptb.Sign"] * (len(results) - 1)]
    runs = [
        run(f"run{i}", scheme=scheme, bits_per_byte=result, true_bits=int(size * MIB), seed=None)
        for i, (result, size, scheme) in enumerate(zip(results, sizes, schemes, strict=True))
    ]
    figure = draw(runs)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == spans
    texts = " ".join(text.get_text() for text in axes.texts)
    for i, result in enumerate(results):
        assert (f"run{i}\n" in texts) == math.isfinite(result)
        assert (f"run{i}" in figure.get_supxlabel()) != math.isfinite(result)


@pytest.mark.parametrize("seed", range(6))
def test_labels_cover_neither_each_other_nor_points(run: Run, draw: Draw, seed: int) -> None:
    chance = random.Random(seed)
    runs = [run("teacher", scheme="fp", bits_per_byte=2.04, true_bits=int(5.4 * MIB))]
    for i in range(2 + seed):
        size = chance.choice((0.9, 1.3)) + chance.uniform(0, 0.02)
        result = 2.1 + 0.1 * i + chance.uniform(0, 0.05)
        runs.append(run(f"run{i}", bits_per_byte=result, true_bits=int(size * MIB), teacher=str(runs[0])))
    (axes,) = draw(runs).axes
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) == len(runs)
    points = [axes.transData.transform(text.xy) for text in axes.texts]  # type: ignore[attr-defined]
    (_, teacher), *_ = axes.transData.transform([(0, 2.04)])
    for i, one in enumerate(labels):
        assert axes.bbox.contains(*one.p0) and axes.bbox.contains(*one.p1)
        assert not one.count_overlaps(labels[:i])
        assert not any(one.contains(*point) for point in points)
        assert not one.y0 < teacher < one.y1


def test_where_labels_find_no_room_every_run_is_a_line_the_best_at_the_top(run: Run, draw: Draw) -> None:
    runs = [run("teacher", scheme="fp", bits_per_byte=2.04, true_bits=int(5.4 * MIB), seed=None)]
    for i, result in enumerate((2.13, 6.3, 2.131, 2.41, 2.132, 2.16)):
        runs.append(run(f"run{i}", bits_per_byte=result, scheme=f"Scheme{i}", teacher=str(runs[0])))
    figure = draw(runs)
    bits, sizes, figures, of_sizes = figure.axes
    assert lines_of(bits) == ["teacher", "run0", "run2", "run4", "run5", "run3", "run1"]
    assert lines_of(figures) == ["2.040", "2.130", "2.131", "2.132", "2.160", "2.410", "6.300"]
    assert lines_of(sizes) == ["fp", "Scheme0", "Scheme2", "Scheme4", "Scheme5", "Scheme3", "Scheme1"]
    assert lines_of(of_sizes) == ["5.40", *["1.00"] * 6]
    assert bits.get_ylim()[0] > bits.get_ylim()[1]
    # What is far off is told by its figure: drawn to scale, it would push all others into one column.
    assert bits.get_xlim()[1] < 2.4
    assert [lines_of(bits)[int(line.get_ydata()[0])] for line in bits.lines if line.get_marker() == ">"] == [
        "run3",
        "run1",
    ]
    assert "triangles: beyond the axis" in figure.get_supxlabel()
    assert "dashed: teacher" in figure.get_supxlabel()


@pytest.mark.parametrize("largest", [1.0, 3.7, 40.0, 900.0])
def test_sizes_below_the_dot_plot_do_not_touch(run: Run, draw: Draw, largest: float) -> None:
    runs = [
        run(f"run{i}", bits_per_byte=2.1 + i / 1000, true_bits=int((0.15 if i else largest) * MIB), seed=None)
        for i in range(14)
    ]
    figure = draw(runs)
    figure.draw_without_rendering()
    sizes = figure.axes[1]
    low, high = sizes.get_xlim()
    labels = [label for at, label in zip(sizes.get_xticks(), sizes.get_xticklabels(), strict=True) if low <= at <= high]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 + 2 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_the_seeds_of_a_setting_are_one_line_with_a_bar(run: Run, draw: Draw) -> None:
    runs = [
        run(f"s{i:02}-seed{seed}", f"lr: {i}", bits_per_byte=2.1 + 0.01 * i + 0.002 * (seed - 1), seed=seed)
        for i in range(20)
        for seed in range(3)
    ]
    figure = draw(runs)
    bits = figure.axes[0]
    assert lines_of(bits) == [f"s{i:02}" for i in range(20)]
    bars = [container.lines[2][0].get_segments()[0] for container in bits.containers]  # type: ignore[attr-defined]
    for i, bar in enumerate(bars):
        assert bar.tolist() == [[pytest.approx(2.098 + 0.01 * i), i], [pytest.approx(2.102 + 0.01 * i), i]]
    assert "bars and ±: standard deviation over 3 seeds" in figure.get_supxlabel()
    heights = [text.get_window_extent() for text in bits.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in zip(heights, heights[1:], strict=False))


def test_many_runs_that_cannot_be_drawn_are_counted(run: Run, draw: Draw) -> None:
    runs = [run(f"run{i}", bits_per_byte=math.nan if i else 2.1, seed=None) for i in range(9)]
    assert draw(runs).get_supxlabel().endswith("not drawn, as not finite: run1, run2, run3 and 5 more")
