"""What a Mamba-2 mixer does between its projections: convolution, SSD and gated norm."""
