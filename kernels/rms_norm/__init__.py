"""RMS norm, gated or not, as Mamba's blocks use it."""
