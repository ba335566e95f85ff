"""A comparison as a LaTeX table, for a paper."""

from pathlib import Path

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison, Row
from bimamba_lit.report.table import COLUMNS, NOTHING, Column, columns_of, evaluation

_SHOWN = ("run", "scheme", "bits/byte", "seeds", "gap", "gap fp", "MiB", "bits/w", "bits/bin")
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    NOTHING: "--",
    **{character: f"\\{character}" for character in "#$%&_"},
}


def write_latex(comparison: Comparison, path: Path) -> None:
    """Write a ``tabular`` in a ``table``, in the style of the package booktabs, which the document must load.

    Raises:
        UserError: If the file cannot be written.
    """
    columns = [column for column in columns_of(comparison) if column.short in (*_SHOWN, *comparison.tests.values())]
    kinds = "".join("l" if column.short in ("run", "scheme") else "r" for column in columns)
    students = [row for row in comparison.rows if not row.is_teacher]
    binary = [row for row in comparison.rows if row.binarized_params]
    best = min(binary or students, key=_result, default=None)

    def cells(row: Row) -> str:
        texts = [_escaped(column.text(row)) for column in columns]
        if row is best:
            place = [column.short for column in columns].index("bits/byte")
            texts[place] = rf"\textbf{{{texts[place]}}}"
        return "  " + " & ".join(texts) + r" \\"

    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"  \centering\small", rf"  \begin{{tabular}}{{{kinds}}}"]
    lines += [
        r"  \toprule",
        "  " + " & ".join(_escaped(_heading(column)) for column in columns) + r" \\",
        r"  \midrule",
    ]
    lines += [cells(row) for row in comparison.rows]
    tests = f" Other columns of bits/byte: {'; '.join(comparison.tests.values())}." if comparison.tests else ""
    caption = _escaped(evaluation(comparison).replace("**", "") + tests)
    lines += [r"  \bottomrule", r"  \end{tabular}", rf"  \caption{{{caption}}}", r"\end{table}", ""]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _result(row: Row) -> float:
    return row.bits_per_byte


def _heading(column: Column) -> str:
    """Return the heading; of another text its name alone, without how much of it was read, which the caption tells."""
    return column.title if column in COLUMNS else column.short.split(",")[0]


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
