import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bimamba_lit.report import lay_side_by_side
from bimamba_lit.report.label_places import Box, common_area, place_labels
from bimamba_lit.report.plot import write_plot

Run = Callable[..., Path]
INSIDE = Box(0, 0, 550, 290)


@pytest.mark.parametrize("seed", range(6))
def test_labels_of_up_to_eight_points_cover_nothing(seed: int) -> None:
    draw = random.Random(seed)
    columns = [draw.uniform(20, 530) for _ in range(2)]  # sizes come in few values
    points = [(draw.choice(columns) + draw.uniform(0, 10), draw.uniform(20, 270)) for _ in range(2 + seed)]
    sizes = [(draw.uniform(50, 140), 20.0) for _ in points]
    line = Box(0, points[0][1] - 1, 550, points[0][1] + 1)
    places = place_labels(points, sizes, INSIDE, [line])
    boxes = [place.box for place in places]
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for i, box in enumerate(boxes):
        assert (box.right - box.left, box.top - box.bottom) == pytest.approx(sizes[i])
        assert common_area(box, INSIDE) == pytest.approx(sizes[i][0] * sizes[i][1])
        assert not any(common_area(box, other) for other in [*boxes[:i], *boxes[i + 1 :], *marks, line])


def test_a_lone_label_stands_right_beside_its_point() -> None:
    (place,) = place_labels([(100, 100)], [(60, 20)], INSIDE)
    assert place.box == Box(110, 90, 170, 110)
    (at_the_edge,) = place_labels([(540, 100)], [(60, 20)], INSIDE)
    assert at_the_edge.box.right == 530


@pytest.mark.parametrize(
    ("results", "sizes", "spans"),
    [
        ([2.16], [0.9], ("linear", "linear")),
        ([2.04, 2.16, 2.2], [5.4, 0.9, 0.9], ("linear", "linear")),
        ([2.04, 2.16, 6.3], [5.4, 0.9, 0.9], ("linear", "log")),
        ([0.9, 1.1, 1.2], [5000.0, 500.0, 20.0], ("log", "linear")),
        ([2.04, math.inf], [5.4, 0.9], ("linear", "linear")),
        ([math.nan], [0.9], ("linear", "linear")),
    ],
)
def test_a_picture_is_drawn(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[float],
    sizes: list[float],
    spans: tuple[str, str],
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    runs = [
        run(
            f"run{i}",
            scheme="fp" if i == 0 else "ptb.Sign",
            bits_per_byte=result,
            true_bits=int(size * 2**23),
            seed=None,
        )
        for i, (result, size) in enumerate(zip(results, sizes, strict=True))
    ]
    write_plot(lay_side_by_side(runs), tmp_path / "report.png")
    assert imread(tmp_path / "report.png").shape == (750, 1200, 4)
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == spans
    texts = " ".join(text.get_text() for text in axes.texts)
    title = axes.get_title(loc="left")
    for i, result in enumerate(results):
        assert (f"run{i}\n" in texts) == math.isfinite(result)
        assert (f"run{i}" in title) != math.isfinite(result)


def test_the_labels_of_a_real_plot_do_not_overlap(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    runs = [run("teacher", scheme="fp", bits_per_byte=2.04, true_bits=int(5.4 * 2**23))]
    for i, result in enumerate((2.13, 2.145, 2.16, 2.41, 2.64, 6.3)):
        runs.append(run(f"run{i}", bits_per_byte=result, scheme=f"Scheme{i}", teacher=str(runs[0])))
    write_plot(lay_side_by_side(runs), tmp_path / "report.png")
    labels = [text.get_window_extent() for text in drawn[0].axes[0].texts if text.get_text()]
    assert len(labels) == 7
    for i, one in enumerate(labels):
        assert not any(one.overlaps(other) for other in labels[i + 1 :])
