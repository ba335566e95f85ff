"""A comparison as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison
from bimamba_lit.report.table import LEFT, columns_of, evaluation, gap_text


def write_markdown(comparison: Comparison, path: Path, plot: str, sections: Sequence[str] = ()) -> None:
    """Write the report.

    Args:
        comparison: The runs.
        path: The file to write.
        plot: The plot's path as seen from the report.
        sections: Lines to end it with.

    Raises:
        UserError: If the file cannot be written.
    """
    columns = columns_of(comparison)
    lines = ["# Comparison", "", evaluation(comparison), ""]
    lines += markdown_table(
        [escaped(column.title) for column in columns],
        ([escaped(column.text(row)) for column in columns] for row in comparison.rows),
        left=sum(column.short in LEFT for column in columns),
    )
    lines += ["", f"![Bits per byte against true size]({plot})", "", *(f"- {note}" for note in _notes(comparison)), ""]
    lines += [*_gaps(comparison), *sections, ""]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table.

    Args:
        titles: Of the columns.
        rows: Their cells, in Markdown.
        left: How many of the first columns are set to the left; the others hold figures.
    """
    sides = [":---" if i < left else "---:" for i in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, sides, *rows)]


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text


def _gaps(comparison: Comparison) -> list[str]:
    """Return the section on what binarization costs on every text, and beside which student; none without one."""
    rows = [row for row in comparison.rows if row.full_precision]
    if not rows:
        return []
    names = {row.runs: row.name for row in comparison.rows}
    rows.sort(key=lambda row: names[row.full_precision])
    texts = [comparison.eval_data["name"], *comparison.tests.values()]
    titles = ["Run", "Full-precision student of its start", "Seeds", *(f"Gap on {text}" for text in texts)]
    cells = [
        [
            row.name,
            names[row.full_precision],
            str(len(row.runs)),
            gap_text(row.gap_to_full_precision, row.gap_spread),
            *(gap_text(*row.test_gaps.get(text, (None, None))) for text in comparison.tests),
        ]
        for row in rows
    ]
    return [
        "## Gap to full precision",
        "",
        "Bits per byte less those of the full-precision student of the same recipe, start, loss and tokens, seed by",
        "seed: the mean over the seeds ± the sample standard deviation. Of several such students, as of other learning",
        f"rates, the one of the least bits per byte on {escaped(texts[0])} counts.",
        "",
        *markdown_table([escaped(title) for title in titles], ([*map(escaped, row)] for row in cells), left=2),
        "",
    ]


def _notes(comparison: Comparison) -> list[str]:
    """Return what a reader has to know of the columns."""
    rows = comparison.rows
    told = [
        "True size counts everything it takes to store the model: signs, scales, bitmaps, and what is left in full "
        "precision. Bits/weight is over the whole model, bits/binarized weight over its binary layers; Binarized is "
        "their share of the weights. Rows that such a layer keeps in full precision count in both.",
        "Perplexity is a token's, so it compares under one tokenizer only; bits per byte compares always.",
    ]
    if any(row.spread is not None for row in rows):
        told.append(
            "± is the sample standard deviation over runs that differ only in their seed; Seeds is how many. Training "
            "time is their mean."
        )
    if any(not row.trained for row in rows):
        told.append("`ptb.` marks models binarized after training and left so.")
    if any(row.agreement is not None for row in rows):
        told.append("Agreement is the share of positions where the likeliest token is the teacher's.")
    return told
