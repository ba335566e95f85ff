"""Autoregressive distillation: a 1-bit student learns the next-token distributions of a frozen teacher."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize import TARGETS, BinaryLinear, binarize_
from bimamba_lit.distill import load_teacher
from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaConfig, MambaLM
from bimamba_lit.models.checkpoint import build, describe
from bimamba_lit.training.language import Batch, LanguageModule
from bimamba_lit.training.optimizer import AdamW
from bimamba_lit.training.pretrain import with_vocabulary


class Distill(LanguageModule):
    """Trains a student whose projections are binary to match a teacher's distributions (Bi-Mamba, arXiv 2411.11843).

    Args:
        teacher: A run folder, a checkpoint, a folder that ``MambaLM.from_pretrained`` takes, any local causal language
            model in transformers' format, or ``hub:OWNER/NAME``. It stays frozen.
        binarizer: The scheme: a class of ``bimamba_lit.binarize`` or of your own, with its options.
            ``null`` trains a full-precision student: the same run without the binarization.
        student: The student's architecture, started at random, or ``teacher`` to start from the weights of a teacher
            that is a Mamba model, in fp32 whatever the teacher is in.
        targets: Layers to binarize: fnmatch patterns on their dotted names or on the last part of them.
        divergence: ``soft_ce``, the paper's cross-entropy against the teacher's distribution; ``forward_kl`` or
            ``reverse_kl``, the divergence from the teacher to the student or back.
        temperature: Divides both models' logits; the loss is multiplied by its square.
        hard_share: Share of the loss that is cross-entropy against the text itself, 0 (the paper's) to 1.
        optimizer: AdamW and its schedule.
        activation_checkpointing: Compute activations inside blocks again in the backward pass, to save memory.
    """

    def __init__(
        self,
        teacher: str,
        binarizer: Callable[[nn.Linear], BinaryLinear] | None,
        student: MambaConfig | Literal["teacher"] = "teacher",
        targets: list[str] = list(TARGETS),  # noqa: B006  (shown as the default in --help; never changed)
        divergence: Literal["soft_ce", "forward_kl", "reverse_kl"] = "soft_ce",
        temperature: float = 1.0,
        hard_share: float = 0.0,
        optimizer: AdamW | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, with_teacher=True, activation_checkpointing=activation_checkpointing)
        self.teacher_path = teacher
        self.binarizer = binarizer
        self.student = student
        self.targets = targets
        self.divergence = divergence
        self.temperature = temperature
        self.hard_share = hard_share
        # Not a submodule: neither the optimizer, nor checkpoints, nor a strategy that shards or syncs may see it.
        self._teacher: list[Any] = []

    @property
    def teacher(self) -> Any:
        """The frozen teacher, on the device of this module."""
        (teacher,) = self._teacher
        if teacher.device != self.device:
            teacher.to(self.device)
        return teacher

    def configure_model(self) -> None:
        """Load the teacher, build the student and binarize it.

        Raises:
            UserError: If the student is to start from the weights of a teacher that is no Mamba model.
        """
        if self._teacher:
            return
        vocab_size, tokenizer = self.data_vocabulary()
        teacher = load_teacher(self.teacher_path, vocab_size, tokenizer)
        if isinstance(self.student, MambaConfig):
            student = MambaLM(with_vocabulary(self.student, teacher.config.vocab_size))
        elif isinstance(teacher, MambaLM):
            student = build(describe(teacher)).float()
            student.load_state_dict(teacher.state_dict())
        else:
            raise UserError(
                f"model.student: the teacher {self.teacher_path} is no Mamba model, so no student can start from its "
                "weights: give the student's d_model and n_layer instead of 'teacher'"
            )
        if self.binarizer is not None:
            binarize_(student, self.binarizer, self.targets)
        self._teacher.append(teacher)
        self.take(student)

    @torch.no_grad()
    def teacher_output(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's hidden states ``(B, L, D_t)`` and head ``(V, D_t)``."""
        teacher = self.teacher
        return teacher.backbone(batch["input_ids"], seq_idx=batch.get("seq_idx")), teacher.head_weight

    def training_step(self, batch: Batch) -> Tensor:
        """Return the distillation loss of a batch, in nats a token."""
        teacher_hidden, teacher_head = self.teacher_output(batch)
        loss = ops.distillation_loss(
            *self.student_output(batch),
            teacher_hidden,
            teacher_head,
            labels=batch["labels"],
            divergence=self.divergence,
            temperature=self.temperature,
            hard_share=self.hard_share,
        )
        return self.log_loss(loss)
