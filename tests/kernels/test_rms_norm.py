"""RMS norm: naive against torch's, the fast form against naive, gradients, groups, tiles."""

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops
from bimamba_lit.kernels.rms_norm import chunked, naive


def make(*shape, dtype=torch.float64, gated=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = {"x": normal(*shape), "weight": normal(shape[-1])}
    return inputs | {"z": normal(*shape)} if gated else inputs


def run(function, inputs, **options):
    y = function(**inputs, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(inputs.values()), direction)]


def test_naive_is_torchs():
    inputs = make(5, 8, gated=False)
    right = F.rms_norm(inputs["x"], (8,), inputs["weight"], 1e-3)
    torch.testing.assert_close(naive.rms_norm(**inputs, eps=1e-3), right)
    gated = make(5, 8)
    right = F.rms_norm(gated["x"] * F.silu(gated["z"]), (8,), gated["weight"], 1e-3)
    torch.testing.assert_close(naive.rms_norm(**gated, eps=1e-3), right)


def test_groups_have_norms_of_their_own():
    inputs = make(3, 12)
    parts = [{name: t.unflatten(-1, (3, 4))[..., g, :] for name, t in inputs.items()} for g in range(3)]
    right = torch.cat([naive.rms_norm(**part) for part in parts], dim=-1)
    torch.testing.assert_close(naive.rms_norm(**inputs, groups=3), right)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated, groups):
    inputs = make(2, 3, 6, gated=gated)
    named = lambda *tensors: chunked.rms_norm(**dict(zip(inputs, tensors, strict=True)), groups=groups)  # noqa: E731
    assert torch.autograd.gradcheck(named, tuple(inputs.values()))


@pytest.mark.parametrize("tile", [1, 40, 1 << 18])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 7, 12), (100, 18)])
@pytest.mark.parametrize("gated", [False, True])
def test_chunked_is_naive(gated, shape, tile, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", tile)
    inputs = make(*shape, gated=gated)
    for a, b in zip(run(chunked.rms_norm, inputs, groups=2), run(naive.rms_norm, inputs, groups=2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("few", [0, 1 << 14])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_few_tokens_and_many_are_naive(dtype, gated, groups, few, monkeypatch):
    monkeypatch.setattr(chunked, "FEW", few)
    inputs = {name: t.detach() for name, t in make(2, 12, dtype=dtype, gated=gated).items()}
    y = chunked.rms_norm(**inputs, groups=groups)
    assert y.dtype == dtype
    torch.testing.assert_close(y, naive.rms_norm(**inputs, groups=groups))


@pytest.mark.parametrize("few", [0, 1 << 14])
def test_a_result_in_half_precision_is_that_of_float32_rounded(few, monkeypatch):
    monkeypatch.setattr(chunked, "FEW", few)
    x, weight, direction = torch.randn(5, 12), torch.randn(12), torch.randn(5, 12).bfloat16()
    for form in (naive, chunked):
        assert torch.equal(form.rms_norm(x, weight, dtype=torch.bfloat16), form.rms_norm(x, weight).bfloat16())
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        found = torch.autograd.grad(form.rms_norm(*leaves, dtype=torch.bfloat16), leaves, direction)
        right = torch.autograd.grad(form.rms_norm(*leaves), leaves, direction.float())
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_strided_inputs_are_read_as_they_are_and_left_alone():
    wide = torch.randn(2, 9, 20, dtype=torch.float64)
    x, z, weight = wide[..., 3:11], wide[..., 12:], torch.randn(8, dtype=torch.float64)
    before = wide.clone()
    torch.testing.assert_close(chunked.rms_norm(x, weight, z), naive.rms_norm(x, weight, z))
    torch.testing.assert_close(chunked.rms_norm(x, weight), naive.rms_norm(x, weight))
    assert torch.equal(wide, before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.005)])
def test_precision(dtype, bound):
    inputs = make(64, 48, dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for a, b in zip(run(chunked.rms_norm, inputs), run(naive.rms_norm, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).square().mean().sqrt() <= bound * b.square().mean().sqrt()


def test_inputs_of_no_size_and_wrong_ones():
    assert ops.rms_norm(torch.zeros(0, 4), torch.ones(4)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        ops.rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"z has shape \(4,\)"):
        ops.rms_norm(torch.zeros(2, 4), torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="groups is 3"):
        ops.rms_norm(torch.zeros(2, 4), torch.ones(4), groups=3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_with_its_residual_it_is_the_norm_and_what_it_was_given(dtype):
    inputs = make(3, 6, dtype=torch.float32, gated=False)
    y, residual = ops.norm_and_residual(**inputs, eps=1e-3, dtype=dtype)
    assert torch.equal(y, ops.rms_norm(**inputs, eps=1e-3, dtype=dtype)) and torch.equal(residual, inputs["x"])
    assert y.dtype == (dtype or torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\), but must be \(D\) = \(6,\)"):
        ops.norm_and_residual(inputs["x"], torch.ones(5))
