"""Measuring language models."""

from bimamba_lit.eval.metrics import BitsPerByte, LanguageMetrics

__all__ = ["BitsPerByte", "LanguageMetrics"]
