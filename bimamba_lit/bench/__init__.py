"""Accuracy and speed, measured on the machine at hand and printed as Markdown tables."""

from bimamba_lit.bench.tables import bench

__all__ = ["bench"]
