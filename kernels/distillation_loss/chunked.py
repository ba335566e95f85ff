"""The distillation loss over a few tokens at a time, its gradients formed in the forward pass.

Logits of a whole batch are the largest tensors of a training step: at V = 50288 one token costs 201 kB a copy, and
autograd keeps several copies for the student and makes the teacher's beside them. The loss is a sum over tokens, so
the gradient of its logits is known as soon as the logits are; it is multiplied out to the hidden states and the head at
once and dropped. The backward pass only scales what was found.

Legend: D_s and D_t widths of student and teacher, V vocabulary, n tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.distillation_loss.naive import counted_positions


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
    """Compute what `naive.distillation_loss` computes, holding logits of `chunk_tokens` tokens at most.

    With n = min(chunk_tokens, tokens) and T tokens in all, the forward pass needs at most, in bytes and beside its
    inputs, ``16 * n * V + 4 * D_s * (V + T)`` in float32; ``4 * n * V`` more where hard and soft terms are both asked
    for, and ``2 * V * (2 * D_s + D_t)`` more for copies of the heads under bfloat16 autocast. The second term, of
    gradients, is absent where none are wanted, and is held twice for a moment in the backward pass.
    """
    positions = _positions(hidden_s, labels, mask)
    student = hidden_s.flatten(0, -2)
    teacher = None if hidden_t is None or hard_share == 1.0 else hidden_t.detach().flatten(0, -2)
    flat_labels = None if labels is None else labels.flatten()
    return _loss(
        student, head_s, teacher, head_t, None, None, flat_labels, positions, divergence, temperature, hard_share,
        chunk_tokens,
    )  # fmt: skip


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
    """Compute what `naive.topk_distillation_loss` computes, holding logits of `chunk_tokens` tokens at most.

    Memory is that of `distillation_loss` without a teacher's logits and head: ``8 * n * V`` bytes a chunk instead of
    ``16 * n * V``.
    """
    positions = _positions(hidden_s, labels, mask)
    ids, log_probs = (None, None) if hard_share == 1.0 else (top_ids.flatten(0, -2), top_log_probs.flatten(0, -2))
    flat_labels = None if labels is None else labels.flatten()
    return _loss(
        hidden_s.flatten(0, -2), head_s, None, None, ids, log_probs, flat_labels, positions, divergence, temperature,
        hard_share, chunk_tokens,
    )  # fmt: skip


def _positions(hidden_s: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the counted tokens, flattened; to find some of them is to wait for the device, to count all is not."""
    if labels is None and mask is None:
        return torch.arange(hidden_s.shape[:-1].numel(), device=hidden_s.device)
    return counted_positions(hidden_s, labels, mask).nonzero().squeeze(1)


def _loss(hidden_s: Tensor, head_s: Tensor, *options: Any) -> Tensor:
    if torch.is_grad_enabled() and (hidden_s.requires_grad or head_s.requires_grad):
        return _Loss.apply(hidden_s, head_s, *options)
    return _walk(hidden_s, head_s, *(*options, False, False))[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_s: Tensor, head_s: Tensor, *options: Any) -> Tensor:
        loss, g_hidden, g_head = _walk(hidden_s, head_s, *options, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(g_hidden, g_head)
        ctx.dtypes = hidden_s.dtype, head_s.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [None if g is None else (g * grad).to(dtype) for g, dtype in pairs]
        return *found, *(None,) * 10


def _walk(
    hidden_s: Tensor, head_s: Tensor, hidden_t: Tensor | None, head_t: Tensor | None, top_ids: Tensor | None,
    top_log_probs: Tensor | None, labels: Tensor | None, positions: Tensor, divergence: str, temperature: float,
    hard_share: float, chunk_tokens: int, want_hidden: bool, want_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the loss and, where wanted, its gradients with respect to hidden_s and head_s."""
    narrow = product_dtype(hidden_s, head_s)
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    weight_s = head_s.to(narrow)
    weight_t = None if hidden_t is None or head_t is None else head_t.detach().to(product_dtype(hidden_t, head_t))
    loss = torch.zeros((), dtype=wide, device=hidden_s.device)
    g_hidden = torch.zeros_like(hidden_s, dtype=wide) if want_hidden else None
    g_head = torch.zeros_like(head_s, dtype=wide) if want_head else None
    with torch.autocast(hidden_s.device.type, enabled=False):
        for chosen in positions.split(chunk_tokens):
            h = hidden_s[chosen].to(narrow)
            z = (h @ weight_s.t()).to(wide)
            z_t = top = None
            if hidden_t is not None and weight_t is not None:
                z_t = (hidden_t[chosen].to(weight_t.dtype) @ weight_t.t()).to(wide)
            elif top_ids is not None and top_log_probs is not None:
                top = top_ids[chosen].long(), top_log_probs[chosen].to(wide)
            chosen_labels = None if labels is None else labels[chosen]
            part, g = _chunk(z, z_t, top, chosen_labels, divergence, temperature, hard_share, want_hidden or want_head)
            del z, z_t
            loss += part
            if g is None:
                continue
            g = g.to(narrow)
            if g_hidden is not None:
                g_hidden[chosen] = (g @ weight_s).to(wide)
            if g_head is not None:
                _accumulate(g_head, g, h)
            del g
    count = max(len(positions), 1)
    for found in (loss, g_hidden, g_head):
        if found is not None:
            found /= count
    return loss, g_hidden, g_head


def _chunk(
    z: Tensor, z_t: Tensor | None, top: tuple[Tensor, Tensor] | None, labels: Tensor | None, divergence: str,
    temperature: float, hard_share: float, grads: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the summed loss of logits (n, V) and, if wanted, its gradient to z; overwrites both logits."""
    loss, g = z.new_zeros(()), None
    if hard_share > 0.0 and labels is not None:
        part, g = _hard(z, labels, grads)
        loss += hard_share * part
        g = None if g is None else g.mul_(hard_share)
    if z_t is None and top is None:
        return loss, g
    if temperature != 1.0:
        z.div_(temperature)
    if top is not None:
        part, g_soft = _soft_top(z, *top, divergence, grads)
    else:
        assert z_t is not None
        part, g_soft = _soft(z, z_t.div_(temperature) if temperature != 1.0 else z_t, divergence, grads)
    loss += (1.0 - hard_share) * temperature**2 * part
    if g_soft is None:
        return loss, None
    g_soft.mul_((1.0 - hard_share) * temperature)
    return loss, g_soft if g is None else g_soft.add_(g)


def _hard(z: Tensor, labels: Tensor, grads: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed cross-entropy of logits (n, V) and, if wanted, its gradient."""
    p, log_sum = _softmax(z)
    loss = (log_sum - z.gather(1, labels[:, None]).squeeze(1)).sum()
    if not grads:
        return loss, None
    p.scatter_add_(1, labels[:, None], p.new_full((len(p), 1), -1.0))
    return loss, p


def _soft(z: Tensor, z_t: Tensor, divergence: str, grads: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed divergence of logits (n, V) and, if wanted, its gradient to z; overwrites both logits."""
    p, log_sum = _softmax(z)
    p_t, log_sum_t = _softmax(z_t)
    if divergence == "reverse_kl":
        weighted = z.sub_(z_t).sub_((log_sum - log_sum_t)[:, None]).mul_(p)
        loss = weighted.sum(-1)
        return loss.sum(), weighted.addcmul_(p, loss[:, None], value=-1.0) if grads else None
    if divergence == "forward_kl":
        loss = z_t.sub_(z).sub_((log_sum_t - log_sum)[:, None]).mul_(p_t).sum()
    else:
        loss = log_sum.sum() - z.mul_(p_t).sum()
    return loss, p.sub_(p_t) if grads else None


def _soft_top(z: Tensor, ids: Tensor, log_p_t: Tensor, divergence: str, grads: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed divergence over k + 1 outcomes and, if wanted, its gradient to the logits z (n, V).

    Args:
        z: The student's logits (n, V).
        ids: The teacher's likeliest tokens (n, k).
        log_p_t: The logarithms of their probabilities and of the rest's (n, k + 1), as `naive` takes them.
        divergence: Which.
        grads: Whether the gradient is wanted.
    """
    p, log_sum = _softmax(z)
    log_p_t = log_p_t.log_softmax(-1)
    p_t, p_top = log_p_t.exp(), p.gather(1, ids)
    p.scatter_(1, ids, 0.0)
    rest = p.sum(-1, keepdim=True)  # summed, since 1 less the others would be nothing but rounding
    log_p = torch.cat([z.gather(1, ids) - log_sum[:, None], rest.clamp_min(torch.finfo(z.dtype).tiny).log()], 1)
    if divergence == "reverse_kl":
        difference = log_p - log_p_t.clamp_min(torch.finfo(z.dtype).min)
        # Without a rest, where k = V, its term is nothing times infinity.
        difference[:, -1].masked_fill_(rest[:, 0] == 0.0, 0.0)
        loss = (torch.cat([p_top, rest], 1) * difference).sum(-1, keepdim=True)
        g = p.mul_(difference[:, -1:] - loss).scatter_(1, ids, p_top * (difference[:, :-1] - loss)) if grads else None
        return loss.sum(), g
    loss = -(p_t * log_p).sum()
    if divergence == "forward_kl":
        loss = loss + torch.special.xlogy(p_t, p_t).sum()
    if not grads:
        return loss, None
    share = p_t[:, -1:] / rest.clamp_min(torch.finfo(z.dtype).tiny)
    return loss, p.mul_(1.0 - share).scatter_(1, ids, p_top - p_t[:, :-1])


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax (n, V) and the log of its denominator (n,), read off each row's largest entry."""
    p = torch.softmax(z, dim=-1)
    return p, z.amax(-1) - p.amax(-1).log()


def _accumulate(g_head: Tensor, g: Tensor, h: Tensor) -> None:
    if g.dtype == g_head.dtype:
        g_head.addmm_(g.t(), h)
    else:
        g_head += g.t() @ h


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """Return the dtype in which hidden states and a head are multiplied."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, head.dtype)
