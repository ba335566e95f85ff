import pytest
import torch
from torch import nn

from bimamba_lit.binarize import FBI
from bimamba_lit.models.linear import Linear


def twins(rows, width, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    ours, plain = Linear(width, rows, bias=bias, dtype=dtype), nn.Linear(width, rows, bias=bias, dtype=dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("shape", [(600,), (1, 600), (1, 1, 600), (2, 600), (2, 2, 600)])
@pytest.mark.parametrize("rows", [900, 1000, 951])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_are_multiplied_as_by_a_plain_layer(rows, shape, bias):
    ours, plain = twins(rows, 600, bias)
    x = torch.randn(shape)
    with torch.no_grad():
        y = ours(x)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
    assert y.shape == (*shape[:-1], rows) and y.is_contiguous()


def test_the_form_for_few_tokens_is_taken(monkeypatch):
    ours, plain = twins(900, 600)
    x = torch.randn(1, 600)
    with torch.no_grad():
        right = plain(x)
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: pytest.fail("the plain product was called"))
        torch.testing.assert_close(ours(x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(856, 192), (1552, 384), (800, 600)])
def test_small_weights_go_to_the_plain_layer(rows, width):
    ours, plain = twins(rows, width)
    x = torch.randn(1, width)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_other_dtypes_go_to_the_plain_layer(dtype, tokens):
    ours, plain = twins(900, 600, dtype=dtype)
    x = torch.randn(tokens, 600, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("tokens", [0, 5])
def test_none_and_more_tokens_go_to_the_plain_layer(tokens):
    ours, plain = twins(900, 600)
    with torch.no_grad():
        assert torch.equal(ours(torch.ones(tokens, 600)), plain(torch.ones(tokens, 600)))


def test_a_width_that_does_not_fit_is_refused():
    ours, _ = twins(900, 600)
    with torch.no_grad(), pytest.raises(RuntimeError):
        ours(torch.ones(2, 300))


def test_gradients_and_autocast_are_those_of_the_plain_layer():
    ours, plain = twins(900, 600)
    x = torch.randn(1, 600)
    for layer in (ours, plain):
        layer(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


def test_a_scheme_takes_it_over():
    ours, plain = twins(900, 600)
    assert torch.equal(FBI(ours).weight, FBI(plain).weight)


@pytest.mark.parametrize("shape", [(2, 512), (1, 1000)])
def test_a_few_tokens_of_another_width_are_told_as_by_torch(shape):
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Linear(1024, 1024)(torch.ones(shape))
