"""Schemes of more than one bit or more than a product: formula, gradients, stored bytes, and formats that refuse."""

import json

import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import (
    OneBit,
    PackedLinear,
    PTBLinear,
    Ternary,
    TwoBit,
    binarize_,
    describe_binarization,
    pack_,
    packed_form,
    ptb,
    quantized_layers,
    retrain_,
)
from bimamba_lit.binarize.ptb.ternary import pack_trits, unpack_trits
from bimamba_lit.binarize.two_sided import TwoSided
from bimamba_lit.errors import UserError
from bimamba_lit.export.deploy import check_deploy
from bimamba_lit.export.deployed_model import DeployedLM
from bimamba_lit.export.gguf import export_gguf
from bimamba_lit.export.safetensors import export_safetensors
from bimamba_lit.export.state_spaces import export_state_spaces
from bimamba_lit.export.transformers_folder import export_transformers
from bimamba_lit.models.count import count_parameters, storage_by_part
from bimamba_lit.models.deployed import deployed_

CODED = pytest.mark.parametrize("scheme", [Ternary, TwoBit])
IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def linear(inputs=13, outputs=7, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def model(scheme, d_model=64):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, d_model=d_model, n_layer=1, headdim=16, d_state=8, chunk_size=8)
    return binarize_(MambaLM(config), scheme).eval()


def half(value):
    return value.half().double()


def gradient_of(layer, upstream):
    (layer.weight * upstream).sum().backward()
    return layer.latent.grad


def test_ternary_is_bitnets_weight_and_its_gradient_goes_straight_through():
    layer, upstream = Ternary(linear(bias=False)), torch.randn(7, 13)
    w = layer.latent.detach().double()
    gamma = half(w.abs().mean())
    right = gamma * torch.where(w.abs() > gamma / 2, w.sign(), 0.0)
    assert {-1.0, 0.0, 1.0} == set((layer.weight / gamma).unique().tolist())
    torch.testing.assert_close(layer.weight.double(), right)
    assert torch.equal(gradient_of(layer, upstream), upstream)


def test_two_bit_is_paretoqs_weight_with_its_gradients():
    layer, upstream = TwoBit(linear(bias=False)), torch.randn(7, 13)
    with torch.no_grad():
        layer.scale *= 0.6  # so that weights lie outside
    latent = layer.latent.detach().double().requires_grad_()
    scale = layer.scale.detach().half().double().requires_grad_()
    ratio = (latent / scale[:, None]).clamp(-1, 1)
    rounded = ((ratio.clamp(-0.99, 0.99) * 2 - 0.5).round() + 0.5) / 2
    right = ((rounded - ratio).detach() + ratio) * scale[:, None]
    right.backward(upstream.double())
    torch.testing.assert_close(layer.weight.double(), right.detach())
    torch.testing.assert_close(gradient_of(layer, upstream).double(), latent.grad)
    torch.testing.assert_close(layer.scale.grad.double(), scale.grad / (7 * 13) ** 0.5)
    assert 0 < (latent.grad == 0).sum() < latent.numel()
    assert layer.scale._no_weight_decay


def test_two_bit_scales_start_at_the_least_error():
    torch.manual_seed(0)
    layer = TwoBit(nn.Linear(256, 4))
    w = layer.latent.detach()

    def error(scale):
        levels = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 4 * scale[:, None, None]
        return (w[:, :, None] - levels).abs().amin(2).square().sum(1)

    tried = torch.stack([error(layer.scale.detach() * factor) for factor in torch.linspace(0.5, 2, 61)])
    assert (error(layer.scale.detach()) <= tried.amin(0) * 1.01).all()


@pytest.mark.parametrize("inputs", [1, 5, 13, 250])
def test_trits_are_packed_exactly_five_to_a_byte(inputs):
    codes = torch.randint(-1, 2, (3, inputs), generator=torch.Generator().manual_seed(0)).float()
    packed = pack_trits(codes)
    assert packed.shape == (3, -(-inputs // 5)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_trits(packed, inputs), codes)


@CODED
def test_packed_it_is_equal_to_the_bit_and_stored_in_the_bits_it_tells(scheme):
    layer = scheme(linear(250))
    with torch.no_grad():
        layer.latent += 0.05 * torch.randn_like(layer.latent)
    packed, x = packed_form(layer), torch.randn(3, 250)
    assert isinstance(packed, PTBLinear) and not list(packed.parameters())
    assert torch.equal(packed.weight, layer.weight) and torch.equal(packed(x), layer(x))
    assert packed.storage() == layer.storage()
    right = {"trits": 7 * 50 * 8, "scale": 16} if scheme is Ternary else {"codes": 2 * 7 * 32 * 8, "scales": 7 * 16}
    assert layer.storage() == right | {"bias": 7 * 16}


@CODED
@pytest.mark.parametrize("weight", [torch.zeros(3, 10), torch.full((3, 10), 1e-9), torch.eye(10)[:3]])
def test_odd_weights(scheme, weight):
    dense = nn.Linear(10, 3, bias=False)
    dense.weight.data = weight
    layer = scheme(dense)
    assert layer.weight.isfinite().all() and torch.equal(packed_form(layer).weight, layer.weight)


@CODED
def test_saved_packed_and_trained_on(scheme, tmp_path):
    lm = model(scheme)
    logits = lm(IDS).logits
    assert describe_binarization(lm)[0]["scheme"] == scheme.__name__
    counted, bits = count_parameters(lm), storage_by_part(lm)
    lm.save_pretrained(tmp_path / "latent")
    again = MambaLM.from_pretrained(tmp_path / "latent").eval()
    assert [type(layer) for _, layer in quantized_layers(again)] == [scheme] * 2
    assert torch.equal(again(IDS).logits, logits)

    export_safetensors(lm, tmp_path / "packed", None, dtype="float32")
    packed = MambaLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(packed(IDS).logits, logits)
    assert count_parameters(packed) == counted and storage_by_part(packed) == bits
    description = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert f"ptb.{scheme.__name__}" in json.dumps(description)

    start = retrain_(packed, scheme)
    assert start == (0, 2) and all(isinstance(layer, scheme) for _, layer in quantized_layers(packed))
    packed(IDS).logits.sum().backward()
    assert all(layer.latent.grad.any() for _, layer in quantized_layers(packed))
    pack_(lm)
    assert torch.equal(lm(IDS).logits, logits)


@CODED
def test_exports_hold_its_dense_weight_and_gguf_refuses_it(scheme, tmp_path):
    lm = model(scheme, 128)
    for form in (lm, pack_(model(scheme, 128))):
        deployed = DeployedLM(form, torch.float32)
        deployed.prepare("exact")
        torch.testing.assert_close(deployed(IDS), lm(IDS).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match=f"in_proj.*{scheme.__name__}.*more than one sign"):
            export_gguf(form, tmp_path / "x.gguf", None)
    check_deploy(lm, ["torchscript", "pt2", "safetensors", "transformers"])
    with pytest.raises(UserError, match=f"deploy: gguf cannot hold {scheme.__name__} .*in_proj"):
        check_deploy(lm, ["gguf"])


@CODED
def test_untrained_it_is_the_post_training_scheme(scheme):
    layer = scheme(linear(bias=False))
    assert torch.equal(getattr(ptb, scheme.__name__)().fit(linear().weight).weight, layer.weight)


def test_one_bit_is_a_two_sided_layer_and_a_norm():
    dense, x = linear(), torch.randn(5, 13)
    layer, plain = OneBit(dense), TwoSided(dense, straight_through="tanh")
    right = plain(x)
    right = (right - right.mean(1, keepdim=True)) / (right.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), right)
    assert torch.equal(layer.weight, plain.weight) and layer.storage() == plain.storage()
    packed = PackedLinear(layer)
    torch.testing.assert_close(packed(x), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x), rtol=1e-4, atol=1e-5)


def test_one_bit_is_saved_packed_and_nothing_drops_its_norm(tmp_path):
    lm = model(OneBit, 128)
    logits = lm(IDS).logits
    export_safetensors(lm, tmp_path / "packed", None, dtype="float32")
    packed = MambaLM.from_pretrained(tmp_path / "packed").eval()
    torch.testing.assert_close(packed(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    for form in (lm, packed):
        for write in (export_gguf, export_transformers, export_state_spaces):
            with pytest.raises(UserError, match=r"OneBit.*it fits safetensors"):
                write(form, tmp_path / "out", None)
        with pytest.raises(UserError, match=r"torchscript cannot hold OneBit \(.*in_proj\).*it fits safetensors"):
            DeployedLM(form, torch.float32)
        with pytest.raises(UserError, match="OneBit.*it fits safetensors"):
            export_gguf(form, tmp_path / "out", None, fallback="f16")
    with pytest.raises(UserError, match="deploy: gguf cannot hold OneBit"):
        check_deploy(lm, ["safetensors", "gguf"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", [OneBit, Ternary, TwoBit])
def test_deployed_it_computes_in_bfloat16(scheme):
    lm = model(scheme)
    with torch.no_grad():
        logits = lm(IDS).logits
        rounded = deployed_(lm)(IDS).logits
    assert not [layer for _, layer in quantized_layers(lm) if not isinstance(layer, PackedLinear | PTBLinear)]
    assert (rounded - logits).norm() <= 0.02 * logits.norm()


def test_a_result_of_more_than_one_sign_is_deployed_too():
    lm = ptb.calibrate_(MambaLM(model(Ternary).config), ptb.TwoBit(), [IDS])
    assert deployed_(lm)(IDS).logits.isfinite().all()
