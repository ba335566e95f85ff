"""How far a student's residual stream is from its teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Return the mean over blocks of ``sum |student - teacher|^2 / sum |teacher|^2``, the sums over counted tokens.

    The squared error by itself would grow with the depth, as the residual stream does; as a share of the teacher's
    power every block weighs the same, and a student that is zero everywhere has the loss 1. OneBit (arXiv 2402.11295)
    adds such a loss to that on logits, and divides every token's hidden states by their length instead.

    Args:
        student: The residual stream after each block, (B, L, D), in any floating dtype.
        teacher: The same of the teacher, of the same shapes; no gradient flows to it.
        counted: (B, L) bool, the tokens that count; the loss is 0 if none does.

    Returns:
        A scalar, float32.
    """
    shares = [_share(ours, theirs.detach(), counted) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(shares).mean()


def _share(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    error = (student.float() - teacher.float()).square().sum(-1)
    power = teacher.float().square().sum(-1)
    return (error * counted).sum() / (power * counted).sum().clamp(min=torch.finfo(torch.float32).tiny)
