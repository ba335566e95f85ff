"""The forms for devices with many cores against the definitions, on the CPU: outputs, every gradient, documents."""

import pytest
import torch

from bimamba_lit.kernels.causal_conv1d import naive as naive_conv
from bimamba_lit.kernels.causal_conv1d import parallel as parallel_conv
from bimamba_lit.kernels.recompute import recompute
from bimamba_lit.kernels.ssd import naive as naive_ssd
from bimamba_lit.kernels.ssd import parallel as parallel_ssd

FORMS = {
    "ssd": (parallel_ssd.ssd, naive_ssd.ssd, {"dt_softplus": True, "return_final_states": True}),
    "conv": (
        parallel_conv.causal_conv1d,
        naive_conv.causal_conv1d,
        {"activation": "silu", "return_final_states": True},
    ),
}


def make(form, length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    if form == "conv":
        return {
            "x": normal(2, 6, length),
            "weight": normal(6, 4),
            "bias": normal(6),
            "initial_states": normal(2, 6, 3),
        }
    return {
        "x": normal(2, length, 4, 5),
        "dt": normal(2, length, 4),
        "A": (-2 * torch.rand(4, generator=generator)).to(dtype).requires_grad_(),
        "B": normal(2, length, 2, 3),
        "C": normal(2, length, 2, 3),
        "D": normal(4),
        "z": normal(2, length, 4, 5),
        "dt_bias": normal(4),
        "initial_states": normal(2, 4, 5, 3),
    }


def documents_of(length):
    """Return seq_idx (2, L): documents of many lengths, and one of all tokens; a number comes again."""
    borders = [border for border in (1, 3, 63, 65, 128, 129, 200) if border < length]
    seq_idx = torch.zeros(2, length, dtype=torch.int32)
    for border in borders:
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def outputs_and_gradients(function, inputs, **options):
    outputs = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), directions)]


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130, 257])
@pytest.mark.parametrize("form", FORMS)
def test_parallel_is_naive(form, length, with_documents):
    parallel, naive, options = FORMS[form]
    inputs = make(form, length)
    options = {**options, "seq_idx": documents_of(length) if with_documents else None}
    found = outputs_and_gradients(parallel, inputs, **options)
    for a, b in zip(found, outputs_and_gradients(naive, inputs, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("form", FORMS)
def test_precision(form, dtype, bound):
    parallel, naive, options = FORMS[form]
    inputs = make(form, 200, dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    found = outputs_and_gradients(parallel, inputs, **options)
    for a, b in zip(found, outputs_and_gradients(naive, exact, **options), strict=True):
        assert (a.double() - b).square().mean().sqrt() <= bound * b.square().mean().sqrt()


@pytest.mark.parametrize("form", FORMS)
def test_inputs_alone_are_kept_for_the_gradients(form):
    parallel, _, options = FORMS[form]
    inputs = make(form, 130)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        parallel(**inputs, **options)
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in inputs.values())


def test_only_what_needs_a_gradient_receives_one():
    x, scale = torch.randn(3, requires_grad=True), torch.randn(3)
    y, unused = recompute(lambda a, b, power, mask: ((a * b) ** power, a + 1), x, scale, 2, None)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * scale**2)
    assert scale.grad is None and unused.requires_grad


def test_a_backward_pass_inside_autocast_rounds_nothing():
    parallel, _, options = FORMS["ssd"]
    inputs = make("ssd", 70, torch.float32)
    right = outputs_and_gradients(parallel, inputs, **options)
    y, states = parallel(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).float() for t in (y, states)]
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad((y, states), list(inputs.values()), directions)
    for a, b in zip(gradients, right[2:], strict=True):
        torch.testing.assert_close(a, b)
