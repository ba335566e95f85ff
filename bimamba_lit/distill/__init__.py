"""Handling the teacher of a distillation; the loss is :func:`bimamba_lit.ops.distillation_loss`."""

from bimamba_lit.distill.causal_teacher import CausalTeacher
from bimamba_lit.distill.teacher import find_checkpoint, load_teacher

__all__ = ["CausalTeacher", "find_checkpoint", "load_teacher"]
