"""LightningModules: training a teacher, distilling a 1-bit student, binarizing a teacher after training."""

from bimamba_lit.training.distill import Distill
from bimamba_lit.training.optimizer import AdamW
from bimamba_lit.training.pretrain import Pretrain
from bimamba_lit.training.ptb import PTB

__all__ = ["PTB", "AdamW", "Distill", "Pretrain"]
