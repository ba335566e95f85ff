"""LightningModules: training a teacher, distilling a 1-bit student."""

from bimamba_lit.training.distill import Distill
from bimamba_lit.training.optimizer import AdamW
from bimamba_lit.training.pretrain import Pretrain

__all__ = ["AdamW", "Distill", "Pretrain"]
