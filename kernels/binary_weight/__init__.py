"""The dense weight that a binary layer multiplies by while it trains."""
