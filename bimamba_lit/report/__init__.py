"""What a run came to, and runs side by side."""

from bimamba_lit.report.compare import compare
from bimamba_lit.report.side_by_side import Comparison, Row, lay_side_by_side
from bimamba_lit.report.summary import Summary, TextResult, read_summary, write_summary
from bimamba_lit.report.table import print_comparison

__all__ = [
    "Comparison",
    "Row",
    "Summary",
    "TextResult",
    "compare",
    "lay_side_by_side",
    "print_comparison",
    "read_summary",
    "write_summary",
]
