"""AdamW with Mamba's exceptions from weight decay, rates of their own for latent weights and scales, and a schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bimamba_lit.binarize import LatentLinear
from bimamba_lit.errors import UserError


@dataclass
class AdamW:
    """AdamW and its learning rate over the run: the paper's settings (Bi-Mamba, arXiv 2411.11843, section 4).

    Args:
        lr: Highest learning rate, reached at the end of the warm-up.
        min_lr: Learning rate at the last step, 0 to ``lr``; the rates of latent weights and scales fall in proportion.
        warmup_steps: Optimizer steps over which the rate rises from zero in a straight line.
        total_steps: Optimizer steps up to the last; ``null`` takes ``trainer.max_steps``.
        weight_decay: Decay of matrices. Biases, norms, ``A_log``, ``D``, ``dt_bias`` and the scales are never decayed.
        betas: AdamW's two averaging rates.
        schedule: How the rate falls after the warm-up: along a ``cosine`` or in a straight line (``linear``).
        latent_lr: Highest learning rate of the latent weights of binary layers; ``null`` takes ``lr``.
        scale_lr: Highest learning rate of their scales and shifts; ``null`` takes ``lr``.
        decay_latent: Decay the latent weights too, as the paper's code does.
    """

    lr: float = 2.5e-4
    min_lr: float = 2.5e-5
    warmup_steps: int = 2000
    total_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear"] = "cosine"
    latent_lr: float | None = None
    scale_lr: float | None = None
    decay_latent: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise UserError(f"optimizer: lr {self.lr} must be above 0 and min_lr {self.min_lr} between 0 and lr")
        for name in ("latent_lr", "scale_lr"):
            if (rate := getattr(self, name)) is not None and rate < 0:
                raise UserError(f"optimizer: {name} is {rate}; it must be 0 or more, or null for lr")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer: warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.weight_decay < 0:
            raise UserError(f"optimizer: weight_decay is {self.weight_decay}; it must be 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer: betas are {list(self.betas)}; both must be 0 or more and below 1")
        if self.schedule not in ("cosine", "linear"):
            raise UserError(f"optimizer: schedule is {self.schedule!r}; it must be cosine or linear")

    def build(self, module: nn.Module, max_steps: int) -> dict[str, Any]:
        """Return what Lightning's ``configure_optimizers`` returns, for the trainable parameters of ``module``.

        Its groups have names: ``matrices`` and ``vectors`` (what is never decayed), ``latent`` and ``scales``; those
        that would be empty are left out.

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
        groups = {
            "matrices": {"lr": self.lr, "weight_decay": self.weight_decay},
            "vectors": {"lr": self.lr, "weight_decay": 0.0},
            "latent": {"lr": self._rate(self.latent_lr), "weight_decay": self.weight_decay * self.decay_latent},
            "scales": {"lr": self._rate(self.scale_lr), "weight_decay": 0.0},
        }
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        binary = _of_latent_layers(module)
        for parameter in module.parameters():
            if parameter.requires_grad:
                vector = parameter.ndim <= 1 or getattr(parameter, "_no_weight_decay", False)
                members[binary.get(id(parameter), "vectors" if vector else "matrices")].append(parameter)
        optimizer = torch.optim.AdamW(
            [{"name": name, "params": members[name], **groups[name]} for name in groups if members[name]],
            betas=self.betas,
        )
        schedule = LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int, total: int) -> float:
        """Return the share of the highest rate at optimizer step ``step``, from 0 to the last, ``total - 1``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps))
        lowest = self.min_lr / self.lr
        falls = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return lowest + (1 - lowest) * falls

    def rates(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the learning rates of an optimizer by what logs call them: ``lr``, and those that have their own."""
        now = {group["name"]: group["lr"] for group in optimizer.param_groups}
        own = {"latent": self.latent_lr, "scales": self.scale_lr}
        rates = {f"lr/{name}": now[name] for name, rate in own.items() if rate is not None and name in now}
        return {"lr": next(iter(now.values()))} | rates

    def _rate(self, own: float | None) -> float:
        return self.lr if own is None else own


def _of_latent_layers(module: nn.Module) -> dict[int, str]:
    """Return the groups of what layers with latent weights train, by its ids; a bias is in no group of its own."""
    groups: dict[int, str] = {}
    for layer in module.modules():
        if isinstance(layer, LatentLinear):
            groups |= {id(parameter): "scales" for parameter in layer.parameters() if parameter is not layer.bias}
            groups[id(layer.latent)] = "latent"
    return groups
