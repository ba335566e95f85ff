"""Mamba-1's selective scan, forward and backward."""
