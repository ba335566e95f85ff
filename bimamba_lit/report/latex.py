"""A comparison as a LaTeX table, for a paper."""

from pathlib import Path

from bimamba_lit.files import replacing
from bimamba_lit.report.side_by_side import Comparison, Row
from bimamba_lit.report.table import NOTHING, columns_of, evaluation

_SHOWN = ("run", "scheme", "bits/byte", "seeds", "gap", "gap fp", "ppl", "MiB", "bits/w")
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
    columns = [column for column in columns_of(comparison) if column.short in _SHOWN]
    kinds = "".join("l" if column.short in ("run", "scheme") else "r" for column in columns)
    best = min((row for row in comparison.rows if not row.is_teacher), key=_result, default=None)

    def cells(row: Row) -> str:
        texts = [_escaped(column.text(row)) for column in columns]
        if row is best:
            place = [column.short for column in columns].index("bits/byte")
            texts[place] = rf"\textbf{{{texts[place]}}}"
        return "  " + " & ".join(texts) + r" \\"

    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"  \centering", rf"  \begin{{tabular}}{{{kinds}}}"]
    lines += [r"  \toprule", "  " + " & ".join(_escaped(column.title) for column in columns) + r" \\", r"  \midrule"]
    lines += [cells(row) for row in comparison.rows]
    caption = _escaped(evaluation(comparison).replace("**", ""))
    lines += [r"  \bottomrule", r"  \end{tabular}", rf"  \caption{{{caption}}}", r"\end{table}", ""]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _result(row: Row) -> float:
    return row.bits_per_byte


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
