"""Mamba language models: configuration, mixers, the model, generation, checkpoints and true sizes."""

from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.lm import MambaLM

__all__ = ["MambaConfig", "MambaLM"]
