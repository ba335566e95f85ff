"""The loss of a student on a teacher's distributions. D_s and D_t are their widths, V is the vocabulary."""

from torch import Tensor

from bimamba_lit.kernels.distillation_loss import chunked, naive
from bimamba_lit.ops.arguments import check_distillation, check_integers, check_shape, readable
from bimamba_lit.ops.backends import pick


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
    backend: str = "auto",
) -> Tensor:
    """Compute (1 - hard_share) * temperature^2 * divergence(teacher, student) + hard_share * cross-entropy.

    The mean is over counted positions: those with `mask` True, if given, and a label other than -100, if given. With
    none counted the loss and its gradients are 0. Products run in autocast's dtype where autocast is on; softmax and
    sums in float32 (float64 for float64 inputs). The chunked and the Triton form never hold
    logits of more than `chunk_tokens` tokens, neither forward nor backward.

    Args:
        hidden_s: The student's final hidden states (..., D_s).
        head_s: The student's output embedding (V, D_s).
        hidden_t: The teacher's final hidden states (..., D_t); None only with ``hard_share=1.0``.
        head_t: The teacher's output embedding (V, D_t); likewise.
        labels: The token to predict at each position (...), int64, -100 where not counted; needed where
            ``hard_share > 0``.
        divergence: ``"soft_ce"`` (-sum p_t log p_s, the paper's), ``"forward_kl"`` (sum p_t log(p_t / p_s)) or
            ``"reverse_kl"`` (sum p_s log(p_s / p_t)), of the softmax of logits / temperature.
        temperature: Positive; the soft term is multiplied by its square.
        hard_share: Weight of the cross-entropy with the labels, 0 to 1.
        mask: Positions that count (...), bool.
        chunk_tokens: Tokens whose logits exist at a time in the chunked and the Triton form.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Gradients flow to `hidden_s` and `head_s` only.

    Raises:
        ValueError: If a shape, an option, a label or the backend is wrong, or an input that is needed is missing.
        TypeError: If `hidden_s` is not of a float dtype, `labels` not of an integer one, or `mask` not bool.

    Source: arXiv 2411.11843, section 3 (soft_ce at temperature 1).
    """
    tokens, vocabulary = check_distillation(
        hidden_s, head_s, labels, mask, divergence, temperature, hard_share, chunk_tokens
    )
    if hard_share < 1.0:
        if hidden_t is None or head_t is None:
            raise ValueError(f"hidden_t and head_t are needed at hard_share = {hard_share}, or set hard_share = 1.0.")
        width = hidden_t.shape[-1] if hidden_t.ndim else 0
        check_shape("hidden_t", hidden_t, "... D", (*tokens, width))
        check_shape("head_t", head_t, "V D", (vocabulary, width))
    run = pick(backend, hidden_s, naive.distillation_loss, chunked.distillation_loss)
    return run(
        hidden_s, head_s, hidden_t, head_t, labels, divergence=divergence, temperature=temperature,
        hard_share=hard_share, mask=mask, chunk_tokens=chunk_tokens,
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
    backend: str = "auto",
) -> Tensor:
    """Compute `distillation_loss` from a teacher's k likeliest tokens, all others together being one more outcome.

    With t the teacher's k + 1 probabilities, S its k tokens and s the student's softmax of logits / temperature,
    soft_ce is ``-sum_{i in S} t_i log s_i - t_rest log s_rest``, s_rest being what the student gives to all tokens
    outside of S; forward_kl and reverse_kl likewise. The gradient of the first two is that of a teacher whose rest is
    spread as the student's own. Merging outcomes never raises a divergence: the KLs are at most those over all tokens,
    and equal them at k = V. Mean, products and sums as in `distillation_loss`.

    Args:
        hidden_s: The student's final hidden states (..., D_s).
        head_s: The student's output embedding (V, D_s).
        top_ids: The teacher's likeliest tokens (..., k), integers, each once at a position.
        top_log_probs: Logarithms of their probabilities at this temperature, then that of the rest (..., k + 1); scaled
            to probabilities that sum to 1. The rest is -inf only at k = V.
        labels: As in `distillation_loss`.
        divergence: As in `distillation_loss`.
        temperature: As in `distillation_loss`; the one that `top_log_probs` were computed at.
        hard_share: As in `distillation_loss`.
        mask: As in `distillation_loss`.
        chunk_tokens: As in `distillation_loss`.
        backend: ``"auto"``, ``"naive"`` or ``"chunked"``.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Gradients flow to `hidden_s` and `head_s` only.

    Raises:
        ValueError: If a shape, an option, a label, a token or the backend is wrong.
        TypeError: If `hidden_s` is not of a float dtype, `labels` or `top_ids` not of an integer one, or `mask` not
            bool.
    """
    tokens, vocabulary = check_distillation(
        hidden_s, head_s, labels, mask, divergence, temperature, hard_share, chunk_tokens
    )
    k = top_ids.shape[-1] if top_ids.ndim else 1
    check_shape("top_ids", top_ids, "... k", (*tokens, k))
    check_integers("top_ids", top_ids)
    check_shape("top_log_probs", top_log_probs, "... k+1", (*tokens, k + 1))
    if readable(top_ids) and top_ids.numel() and not 0 <= int(top_ids.min()) <= int(top_ids.max()) < vocabulary:
        raise ValueError(f"top_ids hold a value outside 0 to {vocabulary - 1}.")
    run = pick(backend, hidden_s, naive.topk_distillation_loss, chunked.topk_distillation_loss)
    return run(
        hidden_s, head_s, top_ids, top_log_probs, labels, divergence=divergence, temperature=temperature,
        hard_share=hard_share, mask=mask, chunk_tokens=chunk_tokens,
    )  # fmt: skip
