"""SSD, the state space duality scan of Mamba-2 (arXiv 2405.21060)."""
