"""Perplexity, bits per byte and agreement with a teacher over an evaluation text.

The logits of a whole batch would dwarf the model at a vocabulary of 50k, so they are formed for a few thousand tokens
at a time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import Perplexity

CHUNK_TOKENS = 2048


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return logits in fp32: in half precision many tie, and both the loss and the likeliest token suffer."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.float())


class BitsPerByte(Metric):
    """Negative log-likelihood in bits of every counted token over the UTF-8 bytes of those same tokens."""

    full_state_update = False
    higher_is_better = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, bytes: Tensor) -> None:
        """Add the summed negative log-likelihood of some tokens, in nats, and their length in bytes; both scalars."""
        self.nats += nats.double()
        self.bytes += bytes

    def compute(self) -> Tensor:
        """Return bits per byte, a scalar."""
        return self.nats / math.log(2) / self.bytes


class LanguageMetrics(nn.Module):
    """What validation reports of a language model: loss, perplexity, bits per byte, agreement with a teacher.

    Args:
        with_teacher: Measure too how often the model's likeliest token is the teacher's.
    """

    def __init__(self, with_teacher: bool = False) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.perplexity = Perplexity(ignore_index=-100)
        self.bits_per_byte = BitsPerByte()
        self.agreement = MeanMetric() if with_teacher else None

    @torch.no_grad()
    def update(
        self,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        label_bytes: Tensor,
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            hidden: ``(B, L, D)`` final hidden states.
            head: ``(V, D)`` output embedding.
            labels: ``(B, L)`` int64 next tokens, -100 where not counted.
            label_bytes: ``(B, L)`` int64 UTF-8 bytes of the labels.
            teacher: The teacher's ``(B, L, D_t)`` hidden states and ``(V, D_t)`` output embedding.
        """
        counted = labels != -100
        if not counted.any():
            return
        targets = labels[counted].split(CHUNK_TOKENS)
        lengths = label_bytes[counted].split(CHUNK_TOKENS)
        states = hidden[counted].split(CHUNK_TOKENS)
        teacher_states = None if teacher is None else teacher[0][counted].split(CHUNK_TOKENS)
        for chunk, target in enumerate(targets):
            logits = _logits(states[chunk], head)
            nats = F.cross_entropy(logits, target, reduction="sum")
            self.loss.update(nats / len(target), weight=len(target))
            self.perplexity.update(logits.unsqueeze(0), target.unsqueeze(0))
            self.bits_per_byte.update(nats, lengths[chunk].sum())
            if self.agreement is not None and teacher is not None and teacher_states is not None:
                same = logits.argmax(-1) == _logits(teacher_states[chunk], teacher[1]).argmax(-1)
                self.agreement.update(same.float())

    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name and start anew."""
        metrics = {name: metric for name, metric in self.named_children() if isinstance(metric, Metric)}
        figures = {name: metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return figures
