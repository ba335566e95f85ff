"""The distillation loss against torch's own losses on full logits, and its memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bimamba_lit import ops

DIVERGENCES = ["soft_ce", "forward_kl", "reverse_kl"]
VOCABULARY = 11


def make(tokens=(2, 7), vocabulary=VOCABULARY, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = normal(*tokens, 5).requires_grad_(), normal(vocabulary, 5).requires_grad_()
    teacher = normal(*tokens, 6).requires_grad_(), normal(vocabulary, 6).requires_grad_()
    labels = torch.randint(vocabulary, tokens, generator=generator)
    labels[..., 1] = -100
    mask = torch.rand(tokens, generator=generator) < 0.7
    return *student, *teacher, labels, mask


def by_torch(hidden_s, head_s, hidden_t, head_t, labels, mask, divergence, temperature, hard_share):
    counted = (mask & (labels != -100)).flatten()
    z_s = (hidden_s @ head_s.t()).flatten(0, -2)[counted]
    z_t = (hidden_t @ head_t.t()).flatten(0, -2)[counted].detach()
    log_s, log_t = (z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1)
    soft = {
        "soft_ce": F.cross_entropy(z_s / temperature, log_t.exp()),
        "forward_kl": F.kl_div(log_s, log_t, log_target=True, reduction="batchmean"),
        "reverse_kl": F.kl_div(log_t, log_s, log_target=True, reduction="batchmean"),
    }[divergence]
    hard = F.cross_entropy(z_s, labels.flatten()[counted])
    return (1 - hard_share) * temperature**2 * soft + hard_share * hard


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("hard_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients(divergence, temperature, hard_share, backend):
    *tensors, labels, mask = make()
    options = {"divergence": divergence, "temperature": temperature, "hard_share": hard_share}
    right = by_torch(*tensors, labels, mask, **options)
    found = ops.distillation_loss(*tensors, labels, mask=mask, chunk_tokens=3, backend=backend, **options)
    torch.testing.assert_close(found, right)
    student = tensors[:2]
    pairs = zip(torch.autograd.grad(found * 3, student), torch.autograd.grad(right * 3, student), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            ops.distillation_loss(*tensors, labels, mask=mask, chunk_tokens=3, backend=backend, **options), right
        )


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, backend):
    hidden_s, head_s, hidden_t, head_t, labels, _ = make((4,), 6)
    options = {"divergence": divergence, "temperature": 1.5, "hard_share": 0.4, "chunk_tokens": 2, "backend": backend}
    teacher = hidden_t.detach(), head_t.detach()
    assert torch.autograd.gradcheck(
        lambda h, w: ops.distillation_loss(h, w, *teacher, labels, **options), (hidden_s, head_s)
    )


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_the_teacher_gets_no_gradient(backend):
    hidden_s, head_s, hidden_t, head_t, _, _ = make()
    ops.distillation_loss(hidden_s, head_s, hidden_t, head_t, backend=backend).backward()
    assert hidden_t.grad is None
    assert head_t.grad is None
    assert head_s.grad.abs().sum() > 0
    frozen = ops.distillation_loss(hidden_s, head_s.detach(), hidden_t, head_t, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden_s)[0], hidden_s.grad)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_hard_labels_alone_need_no_teacher(backend):
    hidden_s, head_s, _, _, labels, _ = make()
    loss = ops.distillation_loss(hidden_s, head_s, labels=labels, hard_share=1.0, backend=backend)
    logits = hidden_s @ head_s.t()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_nothing_counted_is_zero(backend):
    *tensors, labels, mask = make()
    loss = ops.distillation_loss(*tensors, labels, mask=torch.zeros_like(mask), hard_share=0.5, backend=backend)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, tensors[:2]):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_positions_that_do_not_count_may_hold_anything(backend):
    *tensors, labels, mask = make()
    right = ops.distillation_loss(*tensors, labels, mask=mask, backend=backend)
    spoiled = [tensors[0].detach().clone(), tensors[1], tensors[2].detach().clone(), tensors[3]]
    spoiled[0][~mask] = math.nan
    spoiled[2][~mask] = math.nan
    torch.testing.assert_close(ops.distillation_loss(*spoiled, labels, mask=mask, backend=backend), right)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence):
    hidden_s, head_s, hidden_t, head_t, labels, _ = make(dtype=torch.float32)
    inputs = (hidden_s.detach() * 1e3).requires_grad_(), head_s, hidden_t * -1e3, head_t, labels
    loss = ops.distillation_loss(*inputs, divergence=divergence, hard_share=0.5)
    exact = ops.distillation_loss(
        *(t.double() for t in inputs[:4]), labels, divergence=divergence, hard_share=0.5, backend="naive"
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, inputs[:2]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast(divergence):
    *inputs, labels, _ = make((64,), 200, torch.bfloat16)
    hidden_s, head_s, hidden_t, head_t = (t.detach().float().requires_grad_() for t in inputs)
    options = {"divergence": divergence, "hard_share": 0.5, "chunk_tokens": 20}
    right = ops.distillation_loss(
        *(t.double() for t in (hidden_s, head_s, hidden_t, head_t)), labels, **options, backend="naive"
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.distillation_loss(hidden_s, head_s, hidden_t, head_t, labels, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), right, rtol=0.01, atol=0)
    found = torch.autograd.grad(loss, (hidden_s, head_s))
    for a, b in zip(found, torch.autograd.grad(right, (hidden_s, head_s)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.01 * b.norm()


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize(("backend", "chunks_only"), [("chunked", True), ("naive", False)])
@pytest.mark.parametrize("hard_share", [0.0, 0.5])
def test_logits_exist_a_chunk_at_a_time(hard_share, backend, chunks_only):
    *tensors, labels, _ = make((4, 16), 300, torch.float32)
    with Largest() as largest:
        loss = ops.distillation_loss(*tensors, labels, hard_share=hard_share, chunk_tokens=8, backend=backend)
        loss.backward()
    assert (largest.numel <= 8 * 300) == chunks_only


def likeliest(hidden_t, head_t, k, temperature):
    log_t = ((hidden_t @ head_t.t()).detach() / temperature).log_softmax(-1)
    top, ids = log_t.topk(k)
    return ids, torch.cat([top, log_t.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize(("temperature", "hard_share"), [(1.0, 0.0), (2.5, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_likeliest_tokens_and_the_rest_as_one(divergence, temperature, hard_share, backend):
    """Against torch's losses over k + 1 outcomes, written as logits that are merged by a sum."""
    *tensors, labels, mask = make()
    hidden_s, head_s, hidden_t, head_t = tensors
    ids, log_probs = likeliest(hidden_t, head_t, 4, temperature)
    options = {"divergence": divergence, "temperature": temperature, "hard_share": hard_share}
    # Rounded probabilities are scaled to sum to 1.
    found = ops.topk_distillation_loss(
        hidden_s, head_s, ids, log_probs + 0.01, labels, mask=mask, chunk_tokens=3, backend=backend, **options
    )
    logits = hidden_s @ head_s.t()
    scaled = logits / temperature
    outside = torch.ones_like(scaled).scatter(-1, ids, 0.0).bool()
    rest = scaled.masked_fill(~outside, -math.inf).logsumexp(-1, keepdim=True)
    counted = mask & (labels != -100)
    log_s = torch.cat([scaled.gather(-1, ids), rest], -1).log_softmax(-1)[counted]
    log_t = log_probs[counted]
    soft = {
        "soft_ce": -(log_t.exp() * log_s).sum(-1).mean(),
        "forward_kl": F.kl_div(log_s, log_t, log_target=True, reduction="batchmean"),
        "reverse_kl": F.kl_div(log_t, log_s, log_target=True, reduction="batchmean"),
    }[divergence]
    hard = F.cross_entropy(logits[counted], labels[counted])
    right = (1 - hard_share) * temperature**2 * soft + hard_share * hard
    torch.testing.assert_close(found, right)
    student = hidden_s, head_s
    for a, b in zip(torch.autograd.grad(found * 3, student), torch.autograd.grad(right * 3, student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_are_the_whole_teacher(divergence, backend):
    *tensors, labels, _ = make(dtype=torch.float32)
    hidden_s, head_s, hidden_t, head_t = tensors
    whole = ops.distillation_loss(*tensors, labels, divergence=divergence, temperature=1.5)
    top = likeliest(hidden_t, head_t, VOCABULARY, 1.5)
    found = ops.topk_distillation_loss(
        hidden_s, head_s, *top, labels, divergence=divergence, temperature=1.5, backend=backend
    )
    torch.testing.assert_close(found, whole)
    student = hidden_s, head_s
    for a, b in zip(torch.autograd.grad(found, student), torch.autograd.grad(whole, student), strict=True):
        torch.testing.assert_close(a, b)


def test_merging_outcomes_never_raises_a_divergence():
    *tensors, labels, _ = make()
    hidden_s, head_s, hidden_t, head_t = tensors
    for divergence in DIVERGENCES:
        losses = [
            ops.topk_distillation_loss(hidden_s, head_s, *likeliest(hidden_t, head_t, k, 1.0), divergence=divergence)
            for k in range(1, VOCABULARY + 1)
        ]
        assert all(a <= b + 1e-12 for a, b in zip(losses, losses[1:], strict=False))


def test_a_certain_student_and_a_certain_teacher_are_finite():
    hidden = torch.eye(3)[None, :1] * 400
    head = torch.eye(3).requires_grad_()
    for divergence in DIVERGENCES:
        ids, log_probs = torch.tensor([[[0]]]), torch.tensor([[[0.0, -300.0]]])
        loss = ops.topk_distillation_loss(hidden, head, ids, log_probs, divergence=divergence)
        (grad,) = torch.autograd.grad(loss, head)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_ids": torch.full((2, 7, 3), 11)}, "outside 0 to 10"),
        ({"top_ids": torch.zeros(2, 6, 3, dtype=torch.int64)}, "top_ids has shape"),
        ({"top_log_probs": torch.zeros(2, 7, 3)}, "top_log_probs has shape"),
        ({"backend": "triton"}, "has no Triton form"),
        ({"divergence": "kl"}, "must be one of"),
    ],
)
def test_what_is_wrong_with_likeliest_tokens_is_named(change, message):
    hidden_s, head_s, hidden_t, head_t, *_ = make(dtype=torch.float32)
    ids, log_probs = likeliest(hidden_t, head_t, 3, 1.0)
    inputs = {"hidden_s": hidden_s, "head_s": head_s, "top_ids": ids, "top_log_probs": log_probs}
    assert ops.topk_distillation_loss(**inputs).shape == ()
    with pytest.raises(ValueError, match=message):
        ops.topk_distillation_loss(**{**inputs, **change})
