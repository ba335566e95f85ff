"""Bits per byte against true size, as a picture.

Few runs are points of a plane, each with its label beside it. Where labels or points would cover each other, or there
are many, every run is a line of a dot plot instead, the best at the top: lines never collide, however many.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison, Row
from bimamba_lit.report.table import figure as in_three_figures
from bimamba_lit.report.table import shortened, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_KINDS: dict[str, dict[str, Any]] = {
    "full precision": {"marker": "D", "color": "#444444"},
    "1-bit, trained": {"marker": "o", "color": "#1f5fa8"},
    "more bits, trained": {"marker": "s", "color": "#3d8b52"},
    "post-training": {"marker": "o", "color": "#c2571a", "markerfacecolor": "white"},
}
_MORE_BITS_FROM = 1.5  # a binarized weight: ternary, two bits
_TEACHER: dict[str, Any] = {"color": "#444444", "linewidth": 0.8, "linestyle": (0, (4, 4)), "zorder": 1}
_GRID: dict[str, Any] = {"color": "#e4e4e4", "linewidth": 0.8}
_BITS, _SIZE = "bits per byte (lower is better)", "true size (MiB)"
_MOST_IN_THE_PLANE = 12
_LOG_SIZES_FROM = 4.0
_LOG_BITS_FROM = 2.0
# Marks of a decade of sizes that have room where the largest is up to so many times the smallest.
_TICKS_OF_SIZES = ((15.0, (1, 2, 5)), (100.0, (1, 3)), (math.inf, (1,)))
_LONGEST_LABEL, _LONGEST_NAME = 36, 64  # beside a point and of a line, in characters
_MOST_NAMED = 3
# Where a label may stand, the best first: right of its point, left, at the corners, above, below.
_PLACES = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
# How far the dot plot's axis reaches, in distances from the best run to the one at two thirds of the lines.
_REACH = 3.0


def write_plot(comparison: Comparison, path: Path) -> None:
    """Draw bits per byte and true size in MiB of every run, seeds folded to mean and spread, and write a PNG.

    Runs whose bits per byte are not finite cannot be drawn; a line under the plot names them.

    Raises:
        UserError: If the file cannot be written.
    """
    rows = [row for row in comparison.rows if math.isfinite(row.bits_per_byte)]
    few = len(rows) <= _MOST_IN_THE_PLANE
    figure = (_plane(comparison, rows) if few else None) or _dot_plot(comparison, rows)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=figure.dpi)


def _plane(comparison: Comparison, rows: list[Row]) -> "Figure | None":
    """Draw bits per byte over true size; None where a label finds no room."""
    figure = _new_figure(8, 5, comparison, rows)
    axes = figure.add_subplot()
    axes.set_ylabel(_BITS)
    axes.set_xlabel(_SIZE)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not rows:
        return figure
    _set_sizes(axes, rows)
    _set_bits(axes, rows)
    for row in rows:
        axes.errorbar(row.size_mib, row.bits_per_byte, yerr=row.spread or None, capsize=3, **_dot(row, 8))
        if row.is_teacher:
            axes.axhline(row.bits_per_byte, **_TEACHER)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a label that has found room must not move afterwards
    return figure if _label(axes, rows) else None


def _dot_plot(comparison: Comparison, rows: list[Row]) -> "Figure":
    """Draw a line a run, the best at the top: its bits per byte, then its true size, and the figures beside them."""
    values = [row.bits_per_byte for row in rows]
    best, usual = values[0], values[2 * len(values) // 3]
    reach = best + _REACH * (usual - best) if usual > best else math.inf
    notes = ["triangles: beyond the axis"] if values[-1] > reach else []
    if any(row.bits_per_binarized_weight is not None for row in rows):
        notes.append("in brackets: bits a binarized weight")
    names = [shortened(row.name, _LONGEST_NAME) for row in rows]
    width = max(9, 6 + 0.08 * max(map(len, names)))
    figure = _new_figure(width, 1.6 + 0.19 * len(rows), comparison, rows, notes)
    bits, sizes = figure.subplots(1, 2, width_ratios=(5, 2))
    for line, row in enumerate(rows):
        if row.bits_per_byte <= reach:
            bits.errorbar(row.bits_per_byte, line, xerr=row.spread or None, **_dot(row, 6))
        else:
            bits.plot(0.99, line, transform=bits.get_yaxis_transform(), **_dot(row, 6) | {"marker": ">"})
        sizes.plot(row.size_mib, line, **_dot(row, 6))
        if row.is_teacher and row.bits_per_byte <= reach:
            bits.axvline(row.bits_per_byte, **_TEACHER)
    bits.set_xlabel(_BITS)
    sizes.set_xlabel(_SIZE)
    _set_sizes(sizes, rows)
    _name_lines(bits, rows, names)
    _name_lines(bits.twinx(), rows, [with_spread(row) for row in rows])
    _name_lines(sizes, rows, [row.scheme for row in rows])
    _name_lines(sizes.twinx(), rows, [_size(row) for row in rows])
    for axes in (bits, sizes):
        axes.grid(**_GRID)
        axes.set_axisbelow(True)
    return figure


def _name_lines(axes: "Axes", rows: list[Row], names: list[str]) -> None:
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)
    for row, text in zip(rows, axes.get_yticklabels(), strict=True):
        text.set_color(_KINDS[_kind(row)]["color"])


def _size(row: Row) -> str:
    bits = row.bits_per_binarized_weight
    return in_three_figures(row.size_mib) + (f" ({bits:.2f})" if bits is not None else "")


def _new_figure(
    width: float, height: float, comparison: Comparison, rows: list[Row], notes: Sequence[str] = ()
) -> "Figure":
    """Return a figure with what stands around the axes: the kinds of runs over them, what is drawn under them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    kinds = [kind for kind in _KINDS if any(_kind(row) == kind for row in rows)]
    handles = [Line2D([], [], linestyle="none", markersize=8, label=kind, **_KINDS[kind]) for kind in kinds]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handletextpad=0.2)
    figure.supxlabel(_caption(comparison, rows, notes), x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def _caption(comparison: Comparison, rows: list[Row], notes: Sequence[str]) -> str:
    drawn = []
    seeds = sorted({len(row.runs) for row in rows} - {1})
    if seeds:
        number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        drawn.append(f"bars and ±: standard deviation over {number} seeds")
    if any(row.is_teacher for row in rows):
        drawn.append("dashed: teacher")
    lines = [f"{shortened(comparison.eval_data['name'], 60)}, context {comparison.context}, stride {comparison.stride}"]
    lines += ["; ".join([*drawn, *notes])] if drawn or notes else []
    missing = [shortened(row.name, _LONGEST_LABEL) for row in comparison.rows if not math.isfinite(row.bits_per_byte)]
    if missing:
        named, more = ", ".join(missing[:_MOST_NAMED]), len(missing) - _MOST_NAMED
        lines.append(f"not drawn, as not finite: {named}{f' and {more} more' if more > 0 else ''}")
    return "\n".join(lines)


def _kind(row: Row) -> str:
    if row.scheme == "fp":
        return "full precision"
    if not row.trained:
        return "post-training"
    bits = row.bits_per_binarized_weight
    return "1-bit, trained" if bits is None or bits < _MORE_BITS_FROM else "more bits, trained"


def _dot(row: Row, size: float) -> dict[str, Any]:
    return _KINDS[_kind(row)] | {"linestyle": "none", "markersize": size, "zorder": 3}


def _set_sizes(axes: "Axes", rows: list[Row]) -> None:
    sizes = [row.size_mib for row in rows]
    span = max(sizes) / min(sizes)
    if span > _LOG_SIZES_FROM:
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        _set_ticks(axes.xaxis, next(ticks for most, ticks in _TICKS_OF_SIZES if span <= most))
    else:
        axes.set_xlim(0, max(sizes) * 1.25)


def _set_bits(axes: "Axes", rows: list[Row]) -> None:
    low = min(row.bits_per_byte - (row.spread or 0) for row in rows)
    high = max(row.bits_per_byte + (row.spread or 0) for row in rows)
    if low > 0 and high > _LOG_BITS_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        _set_ticks(axes.yaxis, (1, 1.5, 2, 3, 4, 5, 6, 7, 8))
    else:
        margin = max(0.15 * (high - low), 0.02 * high)
        axes.set_ylim(low - margin, high + margin)


def _set_ticks(axis: "Axis", of_a_decade: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=of_a_decade))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _label(axes: "Axes", rows: list[Row]) -> bool:
    """Write every run's label in the first place beside its point where it covers nothing.

    Returns:
        Whether all found one, and no point covers another.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    unit = figure.dpi / 72

    def around(row: Row, width: float, height: float) -> Bbox:
        """Return the box around a run's point and bar, wider and higher by so many points at each side."""
        ends = [(row.size_mib, row.bits_per_byte + sign * (row.spread or 0)) for sign in (-1, 1)]
        (x, low), (_, high) = axes.transData.transform(ends)
        return Bbox.from_extents(x - width * unit, low - height * unit, x + width * unit, high + height * unit)

    points = [around(row, 3, 3) for row in rows]
    if any(point.count_overlaps(points) > 1 for point in points):  # one is itself
        return False
    lines = [around(row, math.inf, 1) for row in rows if row.is_teacher]
    labels: list[Bbox] = []
    for row in rows:
        others = [other for other in rows if other is not row]
        # A label that is this near to another point would seem to be its.
        covered = [around(row, 4, 0), *(around(other, 11, 5) for other in others), *lines, *labels]
        text = axes.annotate(
            f"{shortened(row.name, _LONGEST_LABEL)}\n{row.scheme}, {with_spread(row)}",
            (row.size_mib, row.bits_per_byte),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=_KINDS[_kind(row)]["color"],
            linespacing=1.15,
        )
        for right, up in _PLACES:
            text.set(
                position=(9 * right, up * (2 if right else 8)),
                horizontalalignment={1: "left", 0: "center", -1: "right"}[right],
                verticalalignment={1: "bottom", 0: "center", -1: "top"}[up],
            )
            label = text.get_window_extent()
            inside = axes.bbox.contains(*label.p0) and axes.bbox.contains(*label.p1)
            if inside and not label.count_overlaps(covered):
                labels.append(label)
                break
        else:
            return False
    return True
