"""One token through Mamba-2 blocks whose projections are packed."""
