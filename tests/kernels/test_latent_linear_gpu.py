"""The linear layer of latent weights by packed signs on Hopper: values, every gradient, and how torch wraps it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from bimamba_lit.binarize import FBI, GroupScale, ParetoQ, ScaledSign

kernel = pytest.importorskip("bimamba_lit.kernels.latent_linear.triton")
DEVICE, BF16, FP16 = "cuda", torch.bfloat16, torch.float16
TWO_SIDED = partial(FBI, pattern="two_sided", straight_through="tanh", reach=1.0, scaled_gradients=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, of the first product of a backward pass
]


@pytest.fixture
def by_signs(monkeypatch):
    """Return the products by signs that are taken, by the shape of their result; let any size take them."""
    taken, product = [], kernel.binary_gemm_hopper_sparse

    def spy(x, signs, *rest):
        taken.append((x.shape[0], signs.shape[0]))
        return product(x, signs, *rest)

    monkeypatch.setattr(kernel, "binary_gemm_hopper_sparse", spy)
    monkeypatch.setattr(kernel, "WORTHWHILE", 1)
    monkeypatch.setattr(kernel, "SMALLEST", 1)
    return taken


def ratio(values, right):
    values, right = values.detach().double(), right.detach().double()
    return float((values - right).norm() / right.norm())


def make(scheme, tokens, in_features, out_features, bias=False, dtype=BF16):
    torch.manual_seed(0)
    layer = scheme(nn.Linear(in_features, out_features, bias, DEVICE))
    x = torch.randn(*tokens, in_features, device=DEVICE).to(dtype).float()
    return layer, x, torch.randn(*tokens, out_features, device=DEVICE).to(dtype)


def trained(call, layer, x, upstream, dtype=BF16):
    """Return y and every gradient of a call under autocast, by name."""
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype):
        y = call(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [x, *parameters], upstream.to(y.dtype))
    return {"y": y.detach()} | dict(zip(("x", *names), found, strict=True))


def by_definition(layer, x, upstream):
    wide = x.double().requires_grad_()
    y = layer.finish(F.linear(wide, layer.weight.double(), None if layer.bias is None else layer.bias.double()))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [wide, *parameters], upstream.double())
    return {"y": y.detach()} | dict(zip(("x", *names), found, strict=True))


@pytest.mark.parametrize(
    ("scheme", "tokens", "in_features", "out_features", "bias", "dtype"),
    [
        (FBI, (2, 1024), 2560, 10576, False, BF16),
        (FBI, (2050,), 1536, 6448, True, BF16),
        (TWO_SIDED, (3, 700), 3072, 1536, False, BF16),
        (TWO_SIDED, (700,), 640, 264, True, FP16),
        (partial(FBI, pattern="row"), (4100,), 512, 264, True, BF16),
        (partial(FBI, pattern="single", straight_through="clipped"), (1025,), 256, 1000, True, FP16),
        (ScaledSign, (1024,), 384, 2048, False, FP16),
        (partial(ScaledSign, centred_rows=True, straight_through="bireal"), (1024,), 5120, 2560, False, BF16),
        (partial(GroupScale, group_size=None), (1024,), 640, 72, False, BF16),
        (ParetoQ, (1024,), 640, 512, True, BF16),
    ],
)
def test_values_and_every_gradient(scheme, tokens, in_features, out_features, bias, dtype, by_signs):
    layer, x, upstream = make(scheme, tokens, in_features, out_features, bias, dtype)
    right = by_definition(layer, x, upstream)
    poison = torch.full((x.numel() + upstream.numel(),), torch.nan, device=DEVICE)
    del poison
    found = trained(layer, layer, x, upstream, dtype)
    count = x.shape[:-1].numel()
    assert by_signs == [(count, out_features), (count, in_features)]
    for name, value in found.items():
        assert value.dtype == (dtype if name == "y" else torch.float32), name
        assert ratio(value, right[name]) <= 0.005, name
    again = trained(layer, layer, x, upstream, dtype)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_few_tokens_take_the_dense_weight(tokens, monkeypatch):
    taken, forward = [], kernel.latent_forward
    monkeypatch.setattr(kernel, "latent_forward", lambda *given: taken.append(len(given[0])) or forward(*given))
    layer, x, _ = make(FBI, (tokens,), 5120, 2560)
    with torch.autocast(DEVICE, BF16):
        y = layer(x)
    assert taken == [tokens] * (tokens == 8192)
    assert ratio(y, F.linear(x, layer.weight)) <= 0.005


def test_a_layer_of_16_bits(by_signs):
    layer, x, upstream = make(FBI, (2, 300), 512, 1000, True)
    layer, x = layer.to(BF16), x.to(BF16).requires_grad_()
    y = layer(x)
    y.backward(upstream)
    assert len(by_signs) == 2 and y.dtype == layer.latent.grad.dtype == layer.bias.grad.dtype == BF16
    right = by_definition(layer, x.detach(), upstream)
    assert ratio(y, right["y"]) <= 0.005 and ratio(layer.latent.grad, right["latent"]) <= 0.005


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_it_is_the_same(reentrant, by_signs):
    layer, x, upstream = make(FBI, (2, 300), 512, 1000, True)
    right = trained(layer, layer, x, upstream)
    x.requires_grad_()
    with torch.autocast(DEVICE, BF16):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(upstream)  # within autocast
    assert len(by_signs) == 5
    assert torch.equal(y, right["y"]) and torch.equal(x.grad, right["x"])
    assert all(torch.equal(parameter.grad, right[name]) for name, parameter in layer.named_parameters())


def test_compiled_it_is_one_graph(by_signs):
    layer, x, upstream = make(FBI, (2, 300), 512, 1000)
    right = trained(layer, layer, x, upstream)
    found = trained(torch.compile(layer, fullgraph=True), layer, x, upstream)
    assert len(by_signs) == 4
    for name, value in found.items():
        assert ratio(value, right[name]) <= 0.005, name


def test_parameters_may_be_others_and_tokens_mapped_over(by_signs):
    layer, x, _ = make(FBI, (2, 300), 512, 1000)
    other, _, _ = make(partial(FBI, pattern="column"), (1,), 512, 1000)
    others = {name: parameter.detach().flip(0) for name, parameter in other.named_parameters()}
    with torch.autocast(DEVICE, BF16):
        y = torch.func.functional_call(layer, others, (x,))
        mapped = torch.func.vmap(layer)(x)
    other.load_state_dict(others)
    assert ratio(y, F.linear(x, other.weight)) <= 0.005 and ratio(mapped, F.linear(x, layer.weight)) <= 0.005
    assert by_signs == [(600, 1000), (300, 1000), (300, 1000)]


def test_the_ops_are_registered_as_torch_wants_it():
    layer, x, _ = make(FBI, (300,), 512, 264, True)
    terms = (layer.in_scale, None, layer.in_shift, None, layer.bias, None)
    opcheck(kernel._op, (x.to(BF16).requires_grad_(), layer.latent, *terms, "identity"))
