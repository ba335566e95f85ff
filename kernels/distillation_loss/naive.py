"""The distillation loss with its logits written out: the definition.

Legend: D_s and D_t widths of student and teacher, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def counted_positions(hidden_s: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return bool (tokens,), True where a position has a label other than -100 and is not masked out."""
    counted = torch.ones(hidden_s.shape[:-1], dtype=torch.bool, device=hidden_s.device)
    if mask is not None:
        counted = counted & mask
    if labels is not None:
        counted = counted & (labels != -100)
    return counted.flatten()


def distillation_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    hidden_t: Tensor | None = None,
    head_t: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: str = "soft_ce",
    temperature: float = 1.0,
    hard_share: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Compute the mean over counted positions; `chunk_tokens` plays no part."""
    counted = counted_positions(hidden_s, labels, mask)
    total = int(counted.sum())
    logits_s = _logits(hidden_s, head_s, counted)
    if total == 0:
        return logits_s.sum()
    loss = logits_s.new_zeros(())
    if hard_share > 0.0 and labels is not None:
        hard = F.cross_entropy(logits_s, labels.flatten()[counted], reduction="sum")
        loss = loss + hard_share * hard / total
    if hard_share < 1.0 and hidden_t is not None and head_t is not None:
        with torch.no_grad():
            logits_t = _logits(hidden_t, head_t, counted).to(logits_s.dtype)
        log_s = F.log_softmax(logits_s / temperature, dim=-1)
        log_t = F.log_softmax(logits_t / temperature, dim=-1)
        loss = loss + (1.0 - hard_share) * temperature**2 * _divergence(log_t, log_s, divergence) / total
    return loss


def topk_distillation_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "soft_ce",
    temperature: float = 1.0,
    hard_share: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Compute the mean over counted positions, of k likeliest tokens and the rest as one; `chunk_tokens` is not used.

    The teacher's probabilities are scaled to sum to 1, since they were rounded.
    """
    counted = counted_positions(hidden_s, labels, mask)
    total = int(counted.sum())
    logits = _logits(hidden_s, head_s, counted)
    if total == 0:
        return logits.sum()
    loss = logits.new_zeros(())
    if hard_share > 0.0 and labels is not None:
        loss = loss + hard_share * F.cross_entropy(logits, labels.flatten()[counted])
    if hard_share < 1.0:
        ids = top_ids.flatten(0, -2)[counted].long()
        log_t = top_log_probs.flatten(0, -2)[counted].to(logits.dtype).log_softmax(-1)
        log_p = F.log_softmax(logits / temperature, dim=-1)
        rest = log_p.scatter(1, ids, -torch.inf)
        log_s = log_p.gather(1, ids)
        if ids.shape[1] < logits.shape[1]:
            log_s = torch.cat([log_s, rest.logsumexp(-1, keepdim=True)], 1)
        else:  # no token is left
            log_t = log_t[:, :-1]
        loss = loss + (1.0 - hard_share) * temperature**2 * _divergence(log_t, log_s, divergence) / total
    return loss


def _divergence(log_t: Tensor, log_s: Tensor, divergence: str) -> Tensor:
    """Return the summed divergence of the teacher's and the student's log-probabilities (n, outcomes)."""
    terms = {
        "soft_ce": -log_t.exp() * log_s,
        "forward_kl": log_t.exp() * (log_t - log_s),
        "reverse_kl": log_s.exp() * (log_s - log_t),
    }
    return terms[divergence].sum()


def _logits(hidden: Tensor, head: Tensor, counted: Tensor) -> Tensor:
    both = torch.promote_types(hidden.dtype, head.dtype)
    logits = F.linear(hidden.flatten(0, -2)[counted].to(both), head.to(both))
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
