"""The report on several runs."""

from collections.abc import Collection, Sequence
from pathlib import Path

from bimamba_lit.report.curves import write_curves
from bimamba_lit.report.latex import write_latex
from bimamba_lit.report.markdown import write_markdown
from bimamba_lit.report.plot import write_plot
from bimamba_lit.report.side_by_side import Comparison, lay_side_by_side
from bimamba_lit.report.table import write_csv


def compare(
    run_dirs: Sequence[str | Path], out: str | Path, sections: Sequence[str] = (), drawn: Collection[str | Path] = ()
) -> Comparison:
    """Compare runs and write ``report.md``, ``report.csv``, ``report.tex`` and ``report.png`` into ``out``.

    And ``curves.png``, flips and scales over the steps, where runs have logged them.

    Args:
        run_dirs: The run folders.
        out: The folder of the report.
        sections: Lines of Markdown to end ``report.md`` with.
        drawn: The run folders whose flips and scales are drawn; none draws those of the best.

    Raises:
        UserError: If a run is missing or unfinished, the runs were evaluated on different texts, contexts or strides,
            or a file cannot be written.
    """
    comparison = lay_side_by_side(run_dirs)
    folder = Path(out)
    write_plot(comparison, folder / "report.png")
    if write_curves(comparison, folder / "curves.png", set(map(Path, drawn))):
        sections = ["## Signs and scales", "", "![Flips and scales over the steps](curves.png)", "", *sections]
    write_csv(comparison, folder / "report.csv")
    write_latex(comparison, folder / "report.tex")
    write_markdown(comparison, folder / "report.md", plot="report.png", sections=sections)
    return comparison
