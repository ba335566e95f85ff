"""The fused distillation loss against its definition: loss, every gradient, options, autocast, the registered op."""

import itertools

import pytest
import torch

from bimamba_lit import ops
from bimamba_lit.kernels.distillation_loss import triton as fused
from bimamba_lit.ops import arguments

DIVERGENCES = ["soft_ce", "forward_kl", "reverse_kl"]


def make(tokens=(2, 5), vocabulary=75, dtype=torch.float32, labels=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    found = torch.randint(vocabulary, tokens, generator=generator)
    found[..., 1] = -100
    return {
        "hidden_s": normal(*tokens, 12).requires_grad_(),
        "head_s": normal(vocabulary, 12).requires_grad_(),
        "hidden_t": normal(*tokens, 8),
        "head_t": normal(vocabulary, 8),
        "labels": found if labels else None,
        "mask": torch.rand(tokens, generator=generator) < 0.8,
    }


def doubled(inputs):
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }


def loss_and_gradients(inputs, backend, **options):
    loss = ops.distillation_loss(**inputs, backend=backend, chunk_tokens=4, **options)
    return loss.detach(), *torch.autograd.grad(loss * 3, (inputs["hidden_s"], inputs["head_s"]))


def check(inputs, bound, **options):
    exact = loss_and_gradients(doubled(inputs), "naive", **options)
    found = loss_and_gradients(inputs, "triton", **options)
    for a, b, t in zip(found, exact, (None, inputs["hidden_s"], inputs["head_s"]), strict=True):
        assert a.dtype == (torch.float32 if t is None else t.dtype)
        assert (a.double() - b).norm() <= bound * b.norm()
    with torch.no_grad():
        torch.testing.assert_close(ops.distillation_loss(**inputs, backend="triton", **options), found[0])


@pytest.mark.parametrize(
    ("divergence", "temperature", "hard_share"), [*itertools.product(DIVERGENCES, [1.0, 2.5], [0.0, 0.3])]
)
def test_loss_and_gradients(divergence, temperature, hard_share):
    check(make(), 1e-5, divergence=divergence, temperature=temperature, hard_share=hard_share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    check(make(dtype=dtype), 0.005, temperature=2.0, hard_share=0.5)


@pytest.mark.parametrize("vocabulary", [1, 32, 33, 64])
def test_vocabularies(vocabulary):
    # Against float32, where forward_kl of one token is 0.
    inputs = make((3,), vocabulary)
    for a, b in zip(*(loss_and_gradients(inputs, backend) for backend in ("triton", "naive")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_labels_alone_need_no_teacher():
    inputs = make() | {"hidden_t": None, "head_t": None}
    check(inputs, 1e-5, hard_share=1.0)


def test_without_labels_and_mask():
    check(make(labels=False) | {"mask": None}, 1e-5)


def test_slices_of_larger_tensors():
    inputs = make()
    wide = {name: torch.randn(*inputs[name].shape[:-1], 20) for name in ("hidden_s", "hidden_t", "head_s", "head_t")}
    sliced = {name: t[..., 3 : 3 + inputs[name].shape[-1]].requires_grad_("_s" in name) for name, t in wide.items()}
    check(inputs | sliced, 1e-5)


def test_what_does_not_count_may_hold_anything():
    inputs = make()
    right = loss_and_gradients(inputs, "triton")
    for name in ("hidden_s", "hidden_t"):
        with torch.no_grad():
            inputs[name][~inputs["mask"]] = torch.nan
    for a, b in zip(loss_and_gradients(inputs, "triton"), right, strict=True):
        assert torch.equal(a, b)


def test_nothing_counted_is_zero():
    inputs = make()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    assert all(not t.any() for t in loss_and_gradients(inputs, "triton", hard_share=0.5))


def test_extreme_logits_stay_finite():
    inputs = make()
    with torch.no_grad():
        inputs["hidden_s"] *= 1e3
        inputs["hidden_t"] *= -1e3
    for divergence in DIVERGENCES:
        check(inputs, 1e-3, divergence=divergence, hard_share=0.5)


def test_only_what_needs_a_gradient_receives_one():
    inputs = make()
    full = loss_and_gradients(inputs, "triton")
    for name, right in zip(("hidden_s", "head_s"), full[1:], strict=True):
        others = {key: t.detach() if torch.is_tensor(t) and key != name else t for key, t in inputs.items()}
        loss = ops.distillation_loss(**others, backend="triton", chunk_tokens=4)
        torch.testing.assert_close(torch.autograd.grad(loss * 3, others[name])[0], right)


def test_autocast_is_that_of_the_chunked_form():
    inputs = make()
    exact = loss_and_gradients(doubled(inputs), "naive", hard_share=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(inputs, "triton", hard_share=0.5)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-4 * b.norm() < (a - b).norm() <= 0.01 * b.norm()


def test_float64_is_float64():
    inputs = doubled(make())
    for a, b in zip(loss_and_gradients(inputs, "triton"), loss_and_gradients(inputs, "naive"), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b)


def test_a_label_outside_the_vocabulary_makes_the_loss_nan(monkeypatch):
    monkeypatch.setattr(arguments, "readable", lambda labels: False)
    inputs = make()
    inputs["labels"][0, 0], inputs["mask"][0, 0] = 75, True
    loss = ops.distillation_loss(**inputs, backend="triton", hard_share=0.5)
    assert loss.isnan()


def test_uninitialised_memory_does_not_show(monkeypatch):
    inputs = make()
    right = loss_and_gradients(inputs, "triton", hard_share=0.5)
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        tensor = empty(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for a, b in zip(loss_and_gradients(inputs, "triton", hard_share=0.5), right, strict=True):
        assert torch.equal(a, b)


def test_the_registered_op():
    inputs = make()
    arguments = (
        inputs["hidden_s"].detach().flatten(0, 1).requires_grad_(), inputs["head_s"],
        inputs["hidden_t"].flatten(0, 1), inputs["head_t"], inputs["labels"].flatten().clamp(min=0),
        inputs["mask"].flatten(), torch.float32, torch.float32, "soft_ce", 2.0, 0.5, 4, True, True,
    )  # fmt: skip
    torch.library.opcheck(fused._op, arguments)


def test_no_graph_break():
    inputs = make()
    compiled = torch.compile(
        lambda **inputs: ops.distillation_loss(**inputs, backend="triton", hard_share=0.5),
        backend="aot_eager",
        fullgraph=True,
    )
    loss = compiled(**inputs)
    found = (loss.detach(), *torch.autograd.grad(loss * 3, (inputs["hidden_s"], inputs["head_s"])))
    for a, b in zip(found, loss_and_gradients(inputs, "triton", hard_share=0.5), strict=True):
        torch.testing.assert_close(a, b)
