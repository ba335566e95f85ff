"""Mamba language models with 1-bit projections: training by distillation, comparison and export.

Importing this package imports torch, and neither Lightning nor datasets nor transformers.
"""

from importlib.metadata import PackageNotFoundError, version

from bimamba_lit.models import MambaConfig, MambaLM

try:
    __version__ = version("bimamba-lit")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["MambaConfig", "MambaLM", "__version__"]
