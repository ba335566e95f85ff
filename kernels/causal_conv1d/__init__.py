"""Causal depthwise convolution over time, as Mamba's mixers use it."""
