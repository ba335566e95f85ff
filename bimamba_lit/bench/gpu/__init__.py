"""Speed, error and memory on a GPU, each op and whole models, beside cuBLAS and other packages where installed."""

from bimamba_lit.bench.gpu.run import gpu, tune

__all__ = ["gpu", "tune"]
