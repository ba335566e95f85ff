"""Bits per byte against true size, as a picture."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimamba_lit.files import replacing
from bimamba_lit.report.label_places import Box, place_labels
from bimamba_lit.report.side_by_side import Comparison, Row
from bimamba_lit.report.table import shortened, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS: dict[str, dict[str, Any]] = {
    "full precision": {"marker": "D", "color": "#444444", "markersize": 7, "markeredgecolor": "white"},
    "1-bit, trained": {"marker": "o", "color": "#1f5fa8", "markersize": 8, "markeredgecolor": "white"},
    "more bits, trained": {"marker": "s", "color": "#3d8b52", "markersize": 7, "markeredgecolor": "white"},
    "post-training": {"marker": "o", "color": "#c2571a", "markersize": 8, "markerfacecolor": "white"},
}
_LOG_SIZES_FROM = 8.0
_LOG_BITS_FROM = 2.0
_LEADER_FROM = 14
_LONGEST_LABEL = 36
_MORE_BITS_FROM = 1.5  # a binarized weight: ternary, two bits


def write_plot(comparison: Comparison, path: Path) -> None:
    """Draw bits per byte against true size in MiB, every run labelled, and write a PNG.

    Runs whose bits per byte are not finite cannot be drawn; a line under the plot names them.

    Raises:
        UserError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if math.isfinite(row.bits_per_byte)]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_axes(axes, rows)
    for row in rows:
        spread = row.spread or None
        axes.errorbar(
            row.size_mib, row.bits_per_byte, yerr=spread, capsize=3, linestyle="none", zorder=3, **_KINDS[_kind(row)]
        )
        if row.is_teacher:
            axes.axhline(row.bits_per_byte, color="#444444", linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    for kind in [kind for kind in _KINDS if any(_kind(row) == kind for row in rows)]:
        axes.plot([], [], linestyle="none", label=kind, **_KINDS[kind])
    if rows:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.04), ncols=4, frameon=False, handletextpad=0.2)
    missing = [row.name for row in comparison.rows if row not in rows]
    _captions(axes, comparison, missing)
    canvas.draw()
    # What was laid out stays: a label placed by measured boxes must not move afterwards.
    figure.set_layout_engine("none")
    _label(axes, rows)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=figure.dpi)


def _kind(row: Row) -> str:
    if row.scheme == "fp":
        return "full precision"
    if not row.trained:
        return "post-training"
    bits = row.bits_per_binarized_weight
    return "1-bit, trained" if bits is None or bits < _MORE_BITS_FROM else "more bits, trained"


def _set_axes(axes: "Axes", rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xlabel("true size (MiB)")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not rows:
        return
    sizes = [row.size_mib for row in rows]
    if max(sizes) > _LOG_SIZES_FROM * min(sizes):
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, max(sizes) * 1.25)
    lows = [row.bits_per_byte - (row.spread or 0) for row in rows]
    highs = [row.bits_per_byte + (row.spread or 0) for row in rows]
    low, high = min(lows), max(highs)
    if low > 0 and high > _LOG_BITS_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = max(0.15 * (high - low), 0.02 * high)
        axes.set_ylim(low - margin, high + margin)


def _captions(axes: "Axes", comparison: Comparison, missing: list[str]) -> None:
    data = comparison.eval_data
    text = f"{shortened(data['name'], 60)}, context {comparison.context}, stride {comparison.stride}"
    if missing:
        text += f"\nnot drawn, as their bits per byte are not finite: {', '.join(missing)}"
    axes.set_title(text, loc="left", fontsize=9, color="#555555")


def _label(axes: "Axes", rows: list[Row]) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    unit = figure.dpi / 72
    to_pixels = axes.transData.transform
    points = [tuple(to_pixels((row.size_mib, row.bits_per_byte))) for row in rows]
    labels = [
        axes.annotate(
            f"{shortened(row.name, _LONGEST_LABEL)}\n{row.scheme}, {with_spread(row)}",
            (row.size_mib, row.bits_per_byte),
            xytext=(0, 0),
            textcoords="figure pixels",
            fontsize=8,
            color=_KINDS[_kind(row)]["color"],
            linespacing=1.15,
            horizontalalignment="left",
            verticalalignment="bottom",
        )
        for row in rows
    ]
    extents = [label.get_window_extent() for label in labels]
    obstacles = []
    for row, (x, y) in zip(rows, points, strict=True):
        if row.is_teacher:
            obstacles.append(Box(axes.bbox.x0, y - unit, axes.bbox.x1, y + unit))
        if row.spread and math.isfinite(row.spread):
            low, high = (to_pixels((row.size_mib, row.bits_per_byte + s * row.spread))[1] for s in (-1, 1))
            obstacles.append(Box(x - 4 * unit, low, x + 4 * unit, high))
    places = place_labels(
        points,
        [(extent.width + 4 * unit, extent.height + 2 * unit) for extent in extents],
        Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1),
        obstacles,
        radius=6 * unit,
        unit=unit,
    )
    for label, place, row, point in zip(labels, places, rows, points, strict=True):
        label.set_position((place.box.left + 2 * unit, place.box.bottom + unit))
        if math.dist(place.end, point) > _LEADER_FROM * unit:
            axes.annotate(
                "",
                (row.size_mib, row.bits_per_byte),
                xytext=place.end,
                textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
            )
