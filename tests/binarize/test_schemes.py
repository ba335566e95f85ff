"""Every scheme: one row in SCHEMES, held to its formula, its gradients, its packed form and its true size."""

from functools import partial

import pytest
import torch
from torch import nn

from bimamba_lit import ops
from bimamba_lit.binarize import (
    FBI,
    GroupScale,
    PackedLinear,
    ParetoQ,
    ScaledSign,
    Sign,
    Ternary,
    TwoSided,
    binarize_,
    pack_,
)
from bimamba_lit.binarize.two_sided import rank_one
from bimamba_lit.errors import UserError


def plus_minus(values):
    return torch.where(values > 0, 1.0, -1.0)


def fbi(axes):
    def weight(w):
        beta = w.mean(axes, keepdim=True)
        return (w - beta).abs().mean(axes, keepdim=True) * plus_minus(w) + beta

    return weight


def centred_rows(w):
    mean = w.mean(1, keepdim=True)
    return (w - mean).abs().mean(1, keepdim=True) * plus_minus(w - mean) + mean


def singular(magnitudes):
    u, s, v = torch.linalg.svd(magnitudes.double())
    return (s[0] * u[:, :1] @ v[:1]).float()


def fbi_two_sided(w):
    beta = w.mean(0)
    return singular((w - beta).abs()) * plus_minus(w) + beta


def means(w):
    return w.abs().mean(1, keepdim=True) * w.abs().mean(0) / w.abs().mean() * plus_minus(w)


# scheme, its weight right after construction written out from the papers, its numbers beside the signs for (O, I)
SCHEMES = {
    "Sign": (Sign, plus_minus, lambda o, i: 0),
    "ScaledSign": (ScaledSign, lambda w: w.abs().mean(1, keepdim=True) * plus_minus(w), lambda o, i: o),
    "ScaledSign-centred": (partial(ScaledSign, centred_rows=True), centred_rows, lambda o, i: 2 * o),
    "FBI-column": (FBI, fbi((0,)), lambda o, i: 2 * i),
    "FBI-row": (partial(FBI, pattern="row"), fbi((1,)), lambda o, i: 2 * o),
    "FBI-single": (partial(FBI, pattern="single"), fbi((0, 1)), lambda o, i: 2),
    "FBI-two_sided": (partial(FBI, pattern="two_sided"), fbi_two_sided, lambda o, i: o + 2 * i),
    "TwoSided": (TwoSided, lambda w: singular(w.abs()) * plus_minus(w), lambda o, i: o + i),
    "TwoSided-means": (partial(TwoSided, init="means"), means, lambda o, i: o + i),
    "GroupScale-row": (
        partial(GroupScale, group_size=None),
        lambda w: w.abs().mean(1, keepdim=True) * plus_minus(w),
        lambda o, i: o,
    ),
    "ParetoQ": (ParetoQ, lambda w: w.abs().mean(1, keepdim=True) * plus_minus(w), lambda o, i: o),
}
ROWS = pytest.mark.parametrize(("scheme", "weight", "numbers"), SCHEMES.values(), ids=SCHEMES)


def linear(inputs=13, outputs=7, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight += 0.05  # so that centring makes a difference
        layer.weight[0, 0] = 0.0  # zero counts as -1 everywhere
    return layer


@ROWS
def test_weight_is_the_papers_formula(scheme, weight, numbers):
    dense = linear()
    layer = scheme(dense)
    torch.testing.assert_close(layer.weight, weight(dense.weight.detach()))
    assert layer.latent.dtype == torch.float32 and layer.weight.shape == (7, 13)


@ROWS
def test_forward_multiplies_by_the_binary_weight(scheme, weight, numbers):
    layer, x = scheme(linear()), torch.randn(2, 3, 13)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


@ROWS
def test_packed_layer_equals_the_trained_one(scheme, weight, numbers):
    model = nn.Sequential(scheme(linear()))
    with torch.no_grad():  # away from the start, where some terms are zero or equal
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trained, x = model[0], torch.randn(2, 5, 13)
    expected, dense, signs = model(x).detach(), trained.weight.detach(), trained.packed_signs()
    pack_(model)
    assert isinstance(model[0], PackedLinear) and not list(model.parameters())
    assert torch.equal(model[0].signs, signs)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].weight, dense, rtol=1e-6, atol=1e-6)


@ROWS
def test_storage_counts_signs_scales_and_bias(scheme, weight, numbers):
    layer = scheme(linear())
    bits = layer.storage()
    assert bits["signs"] == 7 * 2 * 8 == layer.packed_signs().numel() * 8  # 13 inputs take two bytes a row
    assert sum(bits.values()) - bits["signs"] - bits["bias"] == 16 * numbers(7, 13)
    assert bits["bias"] == 16 * 7
    assert PackedLinear(layer).storage() == bits


@ROWS
def test_gradients_reach_latent_and_scales(scheme, weight, numbers):
    layer = scheme(linear())
    (layer(torch.randn(4, 13)) * torch.randn(4, 7)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_fbi_gradients_are_the_papers():
    layer, upstream = FBI(linear(bias=False)), torch.randn(7, 13)
    (layer.weight * upstream).sum().backward()
    signs = plus_minus(layer.latent.detach())
    torch.testing.assert_close(layer.latent.grad, layer.in_scale.detach() * upstream)
    torch.testing.assert_close(layer.in_scale.grad, (signs * upstream).sum(0))
    torch.testing.assert_close(layer.in_shift.grad, upstream.sum(0))


@pytest.mark.parametrize("straight_through", ["clipped", "tanh", "bireal", "identity"])
def test_a_reach_is_in_units_of_the_mean_weight_of_a_row(straight_through):
    dense, upstream = linear(bias=False), torch.randn(7, 13)
    with torch.no_grad():
        dense.weight *= 0.02 * torch.arange(7)[:, None]  # rows of every size, one of zeros
    layer = FBI(dense, straight_through=straight_through, reach=1.5)
    (layer.weight * upstream).sum().backward()
    w = layer.latent.detach()
    u = (w / (1.5 * w.abs().mean(1, keepdim=True))).nan_to_num()
    slope = {
        "clipped": (u.abs() <= 1).float(),
        "tanh": 1 / torch.cosh(u).square(),
        "bireal": (2 - 2 * u.abs()).clamp(min=0),
        "identity": torch.ones_like(u),
    }[straight_through]
    reach = (1.5 * w.abs().mean(1, keepdim=True)).clamp(min=1.5e-5)
    torch.testing.assert_close(layer.latent.grad, layer.in_scale.detach() * upstream * slope / reach)
    assert layer.options()["reach"] == 1.5 and (straight_through == "identity" or 0.05 < slope.mean() < 0.95)


def test_a_reach_of_one_has_the_gradient_of_pareto_q():
    dense, upstream = linear(bias=False), torch.randn(7, 13)
    ours, theirs = FBI(dense, pattern="row", straight_through="clipped", reach=1.0), ParetoQ(dense)
    with torch.no_grad():
        ours.out_scale.copy_(theirs.out_scale)
    for layer in (ours, theirs):
        (layer.weight * upstream).sum().backward()
    torch.testing.assert_close(ours.latent.grad, theirs.latent.grad)


def test_a_reach_that_is_not_positive_is_refused():
    with pytest.raises(UserError, match="reach is 0, and must be above 0 or null"):
        FBI(linear(), straight_through="clipped", reach=0)


def test_scaled_sign_passes_the_gradient_of_its_scale_to_the_latent_weights():
    layer, upstream = ScaledSign(linear(bias=False)), torch.randn(7, 13)
    (layer.weight * upstream).sum().backward()
    w = layer.latent.detach()
    through_scale = (upstream * plus_minus(w)).sum(1, keepdim=True) * w.sign() / 13
    torch.testing.assert_close(layer.latent.grad, w.abs().mean(1, keepdim=True) * upstream + through_scale)


def test_scales_are_marked_against_weight_decay():
    layer = FBI(linear())
    assert layer.in_scale._no_weight_decay and layer.in_shift._no_weight_decay
    assert not hasattr(layer.latent, "_no_weight_decay")


def test_weight_cannot_be_replaced_by_a_full_precision_parameter():
    layer = FBI(linear())
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.randn(7, 13))


@ROWS
def test_state_dict_holds_latent_and_no_weight(scheme, weight, numbers):
    layer = scheme(linear())
    state = layer.state_dict()
    assert "latent" in state and "weight" not in state
    other = scheme(nn.Linear(13, 7))
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight, layer.weight)


@ROWS
def test_options_rebuild_the_layer(scheme, weight, numbers):
    layer = scheme(linear())
    again = type(layer)(linear(), **layer.options())
    assert torch.equal(again.weight, layer.weight)


def test_half_precision_weights_become_fp32_latent_weights():
    layer = FBI(nn.Linear(8, 4).to(torch.bfloat16))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


def test_group_scales():
    layer = GroupScale(nn.Linear(16, 6, bias=False), group_size=4)
    w = layer.latent.detach()
    expected = (plus_minus(w).view(6, 4, 4) * w.view(6, 4, 4).abs().mean(2, keepdim=True)).view(6, 16)
    torch.testing.assert_close(layer.weight, expected)
    x = torch.randn(3, 16)
    torch.testing.assert_close(PackedLinear(layer)(x), x @ expected.T, rtol=1e-5, atol=1e-5)
    assert layer.storage() == {"signs": 6 * 16, "group_scale": 16 * 24}


@pytest.mark.parametrize("size", [5, 0, 32])
def test_a_group_that_does_not_divide_the_inputs_is_refused_by_the_layers_name(size):
    model = nn.Sequential(nn.Linear(16, 6))
    with pytest.raises(UserError, match=f"^0: group_size={size} does not divide the layer's 16 inputs"):
        binarize_(model, partial(GroupScale, group_size=size), ["0"])
    assert type(model[0]) is nn.Linear


def test_an_unknown_start_is_refused():
    with pytest.raises(UserError, match="init is 'nmf', and must be svd or means"):
        TwoSided(linear(), init="nmf")


def test_rank_one_is_the_nearest_of_a_matrix_with_structure():
    torch.manual_seed(0)
    magnitudes = (torch.randn(40, 1) * torch.randn(24) + 0.3 * torch.randn(40, 24)).abs()
    rows, columns = rank_one(magnitudes)
    torch.testing.assert_close(rows[:, None] * columns, singular(magnitudes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.mean(), columns.mean())
    assert not torch.cat(rank_one(torch.zeros(3, 5))).any()


@pytest.mark.parametrize(
    ("scheme", "served"),
    [
        (FBI, {"in_scale": 7}),
        (partial(FBI, pattern="single"), {"out_scale": 91}),
        (TwoSided, {"in_scale": 7, "out_scale": 13}),
        (partial(GroupScale, group_size=1), {"group_scale": 1}),
    ],
)
def test_scaled_gradients_are_divided_by_the_root_of_the_weights_served(scheme, served):
    plain, scaled = scheme(linear()), scheme(linear(), scaled_gradients=True)
    upstream = torch.randn(7, 13)
    for layer in (plain, scaled):
        (layer.weight * upstream).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad / served.get(name, 1) ** 0.5)
    assert torch.equal(scaled.weight, plain.weight)


def test_pareto_q_gradients_are_the_papers():
    layer, upstream = ParetoQ(linear(bias=False)), torch.randn(7, 13)
    (layer.weight * upstream).sum().backward()
    w, alpha = layer.latent.detach(), layer.out_scale.detach()
    inside = (w / alpha[:, None]).abs() <= 1
    assert 0 < inside.sum() < w.numel()
    torch.testing.assert_close(layer.latent.grad, inside * upstream)
    torch.testing.assert_close(layer.out_scale.grad, (plus_minus(w) * upstream).sum(1) / w.numel() ** 0.5)
    with torch.no_grad():  # a scale that training takes below zero turns its row round, and no sign
        layer.out_scale[0] = -0.5
    torch.testing.assert_close(layer.weight[0], 0.5 * -plus_minus(w[0]))


def test_signs_agree_between_weight_and_bits():
    layer = Sign(linear())
    bits = ops.unpack_signs(layer.packed_signs(), 13)
    assert torch.equal(bits, layer.weight.detach())
    assert bits[0, 0] == -1


@pytest.mark.parametrize("scheme", [FBI, Ternary])
# torch.compile's own, where it traces an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_it_has_its_gradients(scheme):
    layer, x = scheme(linear()), torch.randn(2, 3, 13)
    right = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), layer.parameters())
    torch.testing.assert_close(found, right)
