"""A comparison as CSV and in the terminal, and the columns of all its tables."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison, Row

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the tables that people read.

    Attributes:
        title: Its heading in the report.
        short: Its heading in the terminal.
        text: What it says of a row.
    """

    title: str
    short: str
    text: Callable[[Row], str]


COLUMNS = (
    Column("Run", "run", lambda row: row.name),
    Column("Scheme", "scheme", lambda row: f"{row.scheme} (teacher)" if row.is_teacher else row.scheme),
    Column("Bits/byte", "bits/byte", lambda row: with_spread(row)),
    Column("Seeds", "seeds", lambda row: str(len(row.runs))),
    Column("Gap to teacher", "gap", lambda row: gap_text(row.gap, None)),
    Column("Gap to full precision", "gap fp", lambda row: gap_text(row.gap_to_full_precision, row.gap_spread)),
    Column("Perplexity", "ppl", lambda row: figure(row.perplexity)),
    Column("Agreement", "agree", lambda row: NOTHING if row.agreement is None else f"{row.agreement:.1%}"),
    Column("True size (MiB)", "MiB", lambda row: figure(row.size_mib)),
    Column("Bits/weight", "bits/w", lambda row: f"{row.bits_per_weight:.2f}"),
    Column("Bits/binarized weight", "bits/bin", lambda row: _bits(row.bits_per_binarized_weight)),
    Column("Binarized", "1-bit", lambda row: f"{row.binarized_share:.1%}"),
    Column("Tokens seen", "tokens", lambda row: count(row.tokens_seen)),
    Column("Training time", "time", lambda row: duration(row.seconds)),
)
LEFT = ("run", "scheme")
_FIRST_TO_GO = ("time", "tokens", "1-bit", "bits/w", "bits/bin", "agree", "ppl", "seeds", "gap", "gap fp")
_LONGEST_NAME = 32


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns: those there always are, and gaps and other texts where these runs have them."""
    gaps = {"gap": [row.gap for row in comparison.rows], "gap fp": [r.gap_to_full_precision for r in comparison.rows]}
    none = [name for name, values in gaps.items() if all(value is None for value in values)]
    columns = [column for column in COLUMNS if column.short not in none]
    tests = [Column(f"{name}, bits/byte", name, partial(_test, text)) for text, name in comparison.tests.items()]
    place = [column.short for column in columns].index("ppl")
    return [*columns[:place], *tests, *columns[place:]]


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write every figure of the comparison, unrounded, an empty field where there is none.

    Raises:
        UserError: If the file cannot be written.
    """
    rows = [
        {
            "name": row.name,
            "scheme": row.scheme,
            "seeds": len(row.runs),
            "bits_per_byte": row.bits_per_byte,
            "bits_per_byte_sd": row.spread,
            "gap_to_teacher": row.gap,
            "gap_to_full_precision": row.gap_to_full_precision,
            "gap_to_full_precision_sd": row.gap_spread,
            "full_precision": " ".join(str(run) for run in row.full_precision),
            "perplexity": row.perplexity,
            "agreement": row.agreement,
            "true_bits": row.true_bits,
            "size_mib": row.size_mib,
            "bits_per_weight": row.bits_per_weight,
            "bits_per_binarized_weight": row.bits_per_binarized_weight,
            "params": row.params,
            "binarized_share": row.binarized_share,
            "tokens_seen": row.tokens_seen,
            "seconds": row.seconds,
            "is_teacher": row.is_teacher,
            "runs": " ".join(str(run) for run in row.runs),
            **{
                f"{name} {quantity}{ending}": results.get(text, (None, None))[place]
                for text, name in comparison.tests.items()
                for quantity, results in (("bits_per_byte", row.tests), ("gap_to_full_precision", row.test_gaps))
                for place, ending in enumerate(("", "_sd"))
            },
        }
        for row in comparison.rows
    ]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the comparison as a table that fits the terminal, leaving out the columns that do not and naming them."""
    console = console or Console()
    columns = [column for column in columns_of(comparison) if column in COLUMNS]
    cells = {column.short: [column.text(row) for row in comparison.rows] for column in columns}
    cells["run"] = [shortened(name, _LONGEST_NAME) for name in cells["run"]]
    if all(len(row.runs) == 1 for row in comparison.rows):
        del cells["seeds"]
    left_out = []
    for column in _FIRST_TO_GO:
        if column == "gap":
            _shorten_names(cells, console.width, at_least=_telling_width(cells["run"]))
        if _width(cells) <= console.width:
            break
        if cells.pop(column, None):
            left_out.append(column)
    _shorten_names(cells, console.width, at_least=8)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in cells:
        justify = "left" if name in LEFT else "right"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row, texts in zip(comparison.rows, zip(*cells.values(), strict=True), strict=True):
        table.add_row(*(Text(text) for text in texts), style="italic" if row.is_teacher else None)
    console.print(Text(evaluation(comparison).replace("**", "")))
    console.print(table)
    if left_out:
        console.print(Text(f"Left out at this width: {', '.join(reversed(left_out))}.", style="dim"))


def evaluation(comparison: Comparison) -> str:
    """Return the sentence that says what the runs were evaluated on."""
    data = comparison.eval_data
    return (
        f"Evaluated on **{data['name']}** (SHA-256 {data['sha256'][:12]}), context {comparison.context}, "
        f"stride {comparison.stride} tokens. Sorted by bits per byte; lower is better."
    )


def _bits(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def with_spread(row: Row) -> str:
    """Return bits per byte, of several runs with their spread."""
    return f"{row.bits_per_byte:.3f}{_spread(row.spread)}"


def gap_text(gap: float | None, spread: float | None) -> str:
    """Return a gap in bits per byte, of several runs with its spread."""
    return NOTHING if gap is None else f"{gap:+z.3f}{_spread(spread)}"


def _test(text: str, row: Row) -> str:
    mean, spread = row.tests.get(text, (None, None))
    return NOTHING if mean is None else f"{mean:.3f}{_spread(spread)}"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.3f}"


def figure(value: float) -> str:
    """Return a positive number in three figures or more: ``0.872``, ``13.4``, ``1,204``, ``1.6e8``."""
    if not math.isfinite(value):
        return str(value)
    if value >= 1e5 or 0 < value < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = 0 if value >= 1000 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def count(value: float) -> str:
    """Return a count in three figures with its unit: ``0``, ``950``, ``1.05M``, ``102M``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: ``45 s``, ``12 min``, ``3.4 h``, ``2.1 d``."""
    for limit, unit in ((86400.0 * 2, 86400.0), (3600.0 * 2, 3600.0), (120.0, 60.0)):
        if seconds >= limit:
            name = {86400.0: "d", 3600.0: "h", 60.0: "min"}[unit]
            return f"{seconds / unit:.{0 if unit == 60.0 else 1}f} {name}"
    return f"{seconds:.0f} s"


def shortened(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` characters, its middle left out: names of runs differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _width(cells: dict[str, list[str]]) -> int:
    # Two spaces between columns and one at either edge: what the table's box and padding come to.
    return sum(max(map(cell_len, [name, *texts])) for name, texts in cells.items()) + 2 * len(cells)


def _telling_width(names: list[str]) -> int:
    """Return the least width of 16 or more at which no two names look alike that do not already."""
    widths = range(16, max(map(len, names)))
    return next((w for w in widths if len({shortened(name, w) for name in names}) == len(set(names))), _LONGEST_NAME)


def _shorten_names(cells: dict[str, list[str]], width: int, at_least: int) -> None:
    longest = max(map(cell_len, cells["run"])) - max(0, _width(cells) - width)
    cells["run"] = [shortened(name, max(at_least, longest)) for name in cells["run"]]
