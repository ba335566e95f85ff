"""The rows as Markdown and as CSV."""

import csv
import io
from dataclasses import asdict

from bimamba_lit.bench.gpu.case import Row

HEADER = "| op | what | shape | by | ms | floor ms | share of floor | error | peak MB | first call s |\n" + (
    "|---|---|---|---|---:|---:|---:|---:|---:|---:|"
)


def markdown_line(row: Row) -> str:
    """Return a row of the table under `HEADER`; a time that is not a CUDA graph's is marked ``(eager)``."""
    if row.ms is None:
        cells = [row.note or "not measured", _number(row.floor_ms), "", "", "", ""]
    else:
        cells = [
            _number(row.ms) + ("" if row.graph else " (eager)"),
            _number(row.floor_ms),
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            "" if row.first_s is None else f"{row.first_s:.1f}",
        ]
    return "| " + " | ".join([row.op, row.name, row.shape, row.by, *(cell.replace("|", "/") for cell in cells)]) + " |"


def to_csv(rows: list[Row]) -> str:
    """Return the rows as CSV, with a header, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*asdict(Row("", "", "", "")), "share"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "share": row.share} for row in rows)
    return text.getvalue()


def _number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"
