"""How far a student's residual stream is from its teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Return the mean over blocks and counted tokens of ``|student - teacher|^2 / |teacher|^2``.

    The squared error by itself would grow with the depth, as the residual stream does, and the norm that reads the
    stream divides every token by its length. As a share of the teacher's power, all blocks and tokens weigh the same,
    and a student that is zero has the loss 1. OneBit (arXiv 2402.11295) adds such a loss to that on logits, and divides
    the student's hidden states by their own length.

    Args:
        student: The residual stream after each block, (B, L, D), in any floating dtype.
        teacher: The same of the teacher, of the same shapes; no gradient flows to it.
        counted: (B, L) bool, the tokens that count; the loss is 0 if none does.

    Returns:
        A scalar, float32.
    """
    shares = [_share(ours.float(), theirs.detach().float()) for ours, theirs in zip(student, teacher, strict=True)]
    return (torch.stack(shares).mean(0) * counted).sum() / counted.sum().clamp(min=1)


def _share(student: Tensor, teacher: Tensor) -> Tensor:
    power = teacher.square().sum(-1)
    return (student - teacher).square().sum(-1) / power.clamp(min=torch.finfo(torch.float32).tiny)
