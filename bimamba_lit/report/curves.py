"""What signs and scales did in training, as a picture: what `BitFlips` and `WeightScales` logged."""

import csv
import io
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison, Row
from bimamba_lit.report.table import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 6  # unless they are chosen
_LONGEST_LABEL = 40
_COLORS = ("#1f5fa8", "#c2571a", "#3d8b52", "#8a4fa0", "#b8962e", "#5b6770")
_DASHES: tuple[tuple[int, tuple[int, ...]], ...] = ((0, ()), (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_STYLES = [{"color": color, "linestyle": dashes} for dashes in _DASHES for color in _COLORS]

Curve = dict[int, float]
Metrics = Mapping[str, Curve]


def write_curves(comparison: Comparison, path: Path, chosen: Set[Path] = frozenset()) -> bool:
    """Draw flips and scales of runs that logged them over their steps, write a PNG, and say if there are any.

    Four panels: the share of signs that changed from one log to the next, and since the start; the scales' mean as a
    share of the first one logged, the mean over layers; and the share of scales that collapsed. Seeds are averaged.

    Args:
        comparison: The runs.
        path: The file to write.
        chosen: The run folders that are drawn; none draws the best.

    Raises:
        UserError: If the file cannot be written.
    """
    rows = [row for row in comparison.rows if not chosen or not chosen.isdisjoint(row.runs)]
    curves = {row.name: metrics for row in rows if (metrics := _metrics_of(row))}
    if not curves:
        path.unlink(missing_ok=True)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True).flat
    drawn = dict(list(curves.items())[: None if chosen else _MOST])
    for axes, (title, quantity) in zip(panels, _PANELS.items(), strict=True):
        for (name, metrics), style in zip(drawn.items(), itertools.cycle(_STYLES), strict=False):
            curve = quantity(metrics)
            marker = "o" if len(curve) == 1 else None  # a line of one point cannot be seen
            label = shortened(name, _LONGEST_LABEL)
            axes.plot(list(curve), list(curve.values()), label=label, marker=marker, **style)
        _set_axes(axes, title)
        if not any(line.get_xdata().size for line in axes.get_lines()):
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", fontsize=9, color="#555555")
    flips, since_start, scales, near_zero = figure.axes
    flips.set_yscale("log")
    for axes in (since_start, near_zero):
        axes.set_ylim(0, axes.get_ylim()[1])
    for axes in (scales, near_zero):
        axes.set_xlabel("optimizer step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if len(drawn) <= _MOST else 3
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8, handlelength=3)
    if len(drawn) < len(curves):
        figure.supxlabel(f"the best {_MOST} of {len(curves)} runs that logged signs", fontsize=8, color="#555555")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=figure.dpi)
    return True


def _set_axes(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color="#333333")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _metrics_of(row: Row) -> dict[str, Curve]:
    """Return the curves of flips and scales by column, the mean over the row's runs."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in row.runs:
        for step, column, value in _logged(run / "metrics.csv"):
            found[column][step].append(value)
    return {
        column: {step: statistics.fmean(values) for step, values in sorted(curve.items())}
        for column, curve in found.items()
    }


def _logged(path: Path) -> Iterable[tuple[int, str, float]]:
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    # What follows the last line feed is a row that a kill cut off.
    for line in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        for column, value in line.items():
            if value and column.startswith(("flips/", "scales/")):
                yield int(line["step"]) + 1, column, float(value)  # the first optimizer step is row 0


def _over_layers(metrics: Metrics, ending: str, of: Callable[[Curve], Curve] = lambda curve: curve) -> Curve:
    """Return the mean over the layers of what ``of`` makes of the curves ``scales/LAYER/ENDING``."""
    layers = [
        of(curve) for column, curve in metrics.items() if column.startswith("scales/") and column.endswith(ending)
    ]
    return {step: statistics.fmean(curve[step] for curve in layers) for step in _common(layers)}


def _common(curves: Sequence[Curve]) -> list[int]:
    return sorted(set.intersection(*map(set, curves))) if curves else []


def _relative(curve: Curve) -> Curve:
    first = next(iter(curve.values()))
    return {step: value / first if first else math.nan for step, value in curve.items()}


_PANELS: dict[str, Callable[[Metrics], Curve]] = {
    "signs changed since the last log, share": lambda metrics: metrics.get("flips/rate", {}),
    "signs changed since the start, share": lambda metrics: metrics.get("flips/since_start", {}),
    "mean scale, share of the first logged": lambda metrics: _over_layers(metrics, "/mean", _relative),
    "scales near zero, share": lambda metrics: _over_layers(metrics, "/near_zero"),
}
