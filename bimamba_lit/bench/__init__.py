"""Accuracy, speed and memory, measured on the machine at hand and printed as Markdown tables."""
