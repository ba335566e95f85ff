"""Layers that are not binary yet: what they multiply by, and that nothing takes their signs for them."""

import copy
import json

import pytest
import torch
from torch import nn

from bimamba_lit.binarize import (
    FBI,
    PackedLinear,
    ScaledSign,
    Sign,
    Unfinished,
    apply_binarization_,
    binarize_,
    describe_binarization,
    pack_,
)
from bimamba_lit.errors import UserError
from bimamba_lit.export import FORMATS, export
from bimamba_lit.kernels.binary_weight.naive import compose
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import copy_in_fp32
from bimamba_lit.models.count import FULL_PRECISION, storage_by_part
from bimamba_lit.models.deployed import deployed_

IDS = torch.arange(20)[None]


def layer_of(scheme=FBI, **state):
    torch.manual_seed(0)
    layer = scheme(nn.Linear(12, 8))
    layer.unfinished = Unfinished(**state) if state else None
    return layer


@pytest.mark.parametrize("scheme", [FBI, ScaledSign, Sign])
def test_the_weight_lies_where_it_says(scheme):
    latent, binary = layer_of(scheme).latent.detach(), layer_of(scheme).weight.detach()
    mixed = layer_of(scheme, way="mix", share=0.25).weight.detach()
    torch.testing.assert_close(mixed, 0.75 * latent + 0.25 * binary)
    rows = layer_of(scheme, way="rows", share=0.4).weight.detach()
    assert torch.equal(rows[:3], binary[:3]) and torch.equal(rows[3:], latent[3:])
    for way in ("mix", "rows"):
        assert torch.equal(layer_of(scheme, way=way, share=0.0).weight, latent)
        torch.testing.assert_close(layer_of(scheme, way=way, share=1.0).weight.detach(), binary)


def test_the_temperature_goes_from_tanh_to_the_sign():
    layer = layer_of(way="tanh", share=0.5)
    latent, scale, shift = (t.detach() for t in (layer.latent, layer.in_scale, layer.in_shift))
    unit = latent.abs().mean(1, keepdim=True)
    torch.testing.assert_close(layer.weight.detach(), scale * torch.tanh(30**0.5 * latent / unit) + shift)
    layer.unfinished = Unfinished("tanh", 0.0)
    torch.testing.assert_close(layer.weight.detach(), scale * torch.tanh(latent / unit) + shift)
    binary = layer_of().weight.detach()
    layer.unfinished = Unfinished("tanh", 1.0)
    assert ((layer.weight - binary).abs() > 1e-3 * scale).float().mean() < 0.1


@pytest.mark.parametrize("scheme", [FBI, ScaledSign])
def test_the_gradient_of_the_temperature_is_its_derivative_where_the_size_of_a_row_stands_still(scheme):
    layer, upstream = layer_of(scheme, way="tanh", share=0.3).double(), torch.randn(8, 12, dtype=torch.float64)
    leaves = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    unit = layer.latent.detach().abs().mean(1, keepdim=True)
    weight = compose(torch.tanh(30**0.3 * layer.latent / unit), **layer.terms())
    expected = torch.autograd.grad((weight * upstream).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad((layer.weight * upstream).sum(), leaves), expected)


def test_the_gradient_of_a_mixture_is_a_mixture():
    upstream = torch.randn(8, 12)

    def gradient(layer):
        (layer.weight * upstream).sum().backward()
        return layer.latent.grad, layer.in_scale.grad

    binary, scale = gradient(layer_of())
    found, found_scale = gradient(layer_of(way="mix", share=0.25))
    torch.testing.assert_close(found, 0.75 * upstream + 0.25 * binary)
    torch.testing.assert_close(found_scale, 0.25 * scale)
    found, _ = gradient(layer_of(way="rows", share=0.5))
    torch.testing.assert_close(found, torch.cat([binary[:4], upstream[4:]]))


def test_the_layer_multiplies_by_it_also_where_it_decodes_and_under_autocast():
    layer, x = layer_of(way="mix", share=0.5).eval(), torch.randn(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        before, layer.unfinished = layer(x), Unfinished("mix", 0.75)
        assert not torch.equal(layer(x), before)
        layer.unfinished = None
        assert torch.equal(layer(x), layer_of().eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        layer.unfinished = Unfinished("tanh", 0.5)
        assert layer.train()(x).dtype == torch.bfloat16


def unfinished_model(make):
    lm = binarize_(make(), FBI)
    layers = [layer for layer in lm.modules() if isinstance(layer, FBI)]
    layers[0].unfinished = layers[1].unfinished = Unfinished("mix", 0.5)
    layers[2].unfinished = Unfinished("tanh", 0.25)
    return lm.eval()


@torch.no_grad()
def test_a_saved_model_and_a_copy_are_as_far(make, tmp_path):
    lm = unfinished_model(make)
    lm.save_pretrained(tmp_path)
    for again in (MambaLM.from_pretrained(tmp_path).eval(), copy_in_fp32(lm).eval(), copy.deepcopy(lm)):
        assert torch.equal(again(IDS).logits, lm(IDS).logits)
        assert describe_binarization(again) == describe_binarization(lm)
    assert [entry.get("unfinished", {}).get("way") for entry in describe_binarization(lm)] == ["mix", "tanh", None]


@torch.no_grad()
def test_it_is_neither_packed_nor_exported_as_signs(make, tmp_path):
    lm = unfinished_model(make)
    modules = list(lm.modules())
    for take in (pack_, lambda lm: PackedLinear(lm.backbone.layers[0].mixer.in_proj)):
        with pytest.raises(UserError, match=r"not binary yet \(mix, 50% of the way\)"):
            take(lm)
    assert modules == list(lm.modules())
    lm.save_pretrained(tmp_path / "saved")
    for format in FORMATS:
        if format == "transformers":  # dense matrices, those that the model multiplies by
            export(tmp_path / "saved", format, tmp_path / format, {"dtype": "float32"})
            dense = MambaLM.from_pretrained(tmp_path / format).eval()
            torch.testing.assert_close(dense(IDS).logits, lm(IDS).logits, rtol=1e-4, atol=1e-5)
            continue
        with pytest.raises(UserError, match="not binary yet"):
            export(tmp_path / "saved", format, tmp_path / format, {})
        assert not (tmp_path / format).exists()
    logits = lm(IDS).logits
    assert float((deployed_(lm)(IDS).logits - logits).norm() / logits.norm()) < 0.05  # as generate has it on a GPU


def test_its_size_is_that_of_full_precision(make):
    lm = unfinished_model(make)
    finished, found = storage_by_part(binarize_(make(), FBI)), storage_by_part(lm)
    open_layers = [layer for layer in lm.modules() if isinstance(layer, FBI) and layer.unfinished]
    assert found["unfinished"] == 16 * sum(layer.latent.numel() for layer in open_layers)
    assert found["signs"] < finished["signs"] and found[FULL_PRECISION] == finished[FULL_PRECISION]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"way": "leap", "share": 0.5}, "rows, mix, tanh, not by 'leap'"),
        ({"way": "mix", "share": 1.5}, "from 0 to 1, not 1.5"),
        ({"way": "mix", "share": "x"}, "from 0 to 1, not 'x'"),
        ({"way": "mix"}, "must have 'way' and 'share'"),
        (7, "must have 'way' and 'share', not 7"),
    ],
)
def test_a_description_that_says_it_wrongly_is_refused(make, state, message):
    (entry,) = json.loads(json.dumps(describe_binarization(binarize_(make(), FBI))))
    with pytest.raises(UserError, match=message):
        apply_binarization_(make(), [entry | {"unfinished": state}])
