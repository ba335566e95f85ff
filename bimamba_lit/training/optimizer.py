"""AdamW with Mamba's exceptions from weight decay, and a cosine schedule with warm-up."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bimamba_lit.errors import UserError


@dataclass
class AdamW:
    """AdamW and its learning rate over the run: the paper's settings (Bi-Mamba, arXiv 2411.11843, section 4).

    Args:
        lr: Highest learning rate, reached at the end of the warm-up.
        min_lr: Learning rate at the last step.
        warmup_steps: Optimizer steps over which the rate rises from zero in a straight line.
        total_steps: Optimizer steps over which it then falls along a cosine; ``null`` takes ``trainer.max_steps``.
        weight_decay: Decay of matrices. Biases, norms, ``A_log``, ``D``, ``dt_bias`` and the scales are never decayed.
        betas: AdamW's two averaging rates.
    """

    lr: float = 2.5e-4
    min_lr: float = 2.5e-5
    warmup_steps: int = 2000
    total_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise UserError(f"optimizer: lr {self.lr} must be above 0 and min_lr {self.min_lr} between 0 and lr")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer: warmup_steps is {self.warmup_steps}; it must be 0 or more")

    def build(self, module: nn.Module, max_steps: int) -> dict[str, Any]:
        """Return what Lightning's ``configure_optimizers`` returns, for the trainable parameters of ``module``.

        Args:
            module: The model to train.
            max_steps: ``trainer.max_steps``, taken where ``total_steps`` is not set.

        Raises:
            UserError: If neither says how long the schedule is.
        """
        total = self.total_steps if self.total_steps is not None else max_steps
        if total < 1:
            raise UserError(
                "the schedule has no length: set trainer.max_steps or model.init_args.optimizer.total_steps"
            )
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                excluded = parameter.ndim <= 1 or getattr(parameter, "_no_weight_decay", False)
                (kept if excluded else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        schedule = LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int, total: int) -> float:
        """Return the share of ``lr`` at optimizer step ``step`` (from 0) of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        lowest = self.min_lr / self.lr
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
