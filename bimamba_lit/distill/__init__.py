"""The teacher of a distillation and the loss on hidden states; logits: :func:`bimamba_lit.ops.distillation_loss`."""

from bimamba_lit.distill.causal_teacher import CausalTeacher
from bimamba_lit.distill.hidden import hidden_state_loss
from bimamba_lit.distill.stored_teacher import StoredTeacher, is_stored_teacher
from bimamba_lit.distill.teacher import find_checkpoint, load_teacher

__all__ = [
    "CausalTeacher",
    "StoredTeacher",
    "find_checkpoint",
    "hidden_state_loss",
    "is_stored_teacher",
    "load_teacher",
]
