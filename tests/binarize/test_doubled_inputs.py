"""A second sign for some inputs: which, the weight, its gradients, its bits, and where it goes."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bimamba_lit import MambaLM
from bimamba_lit.binarize import (
    FBI,
    DoubledInputs,
    GroupScale,
    KeptRows,
    OneBit,
    PackedLinear,
    ParetoQ,
    PTBLinear,
    ScaledSign,
    Sign,
    Ternary,
    TwoSided,
    Unfinished,
    apply_binarization_,
    binarize_,
    binary_layers,
    describe_binarization,
    innermost,
    pack_,
    ptb,
    quantized_layers,
    retrain_,
)
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import convert
from bimamba_lit.models.checkpoint import build, copy_in_fp32, describe
from bimamba_lit.models.count import count_parameters, storage_by_part, true_bits
from bimamba_lit.models.deployed import deployed_
from bimamba_lit.ops import pack_signs

IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
SHARES = {"in_proj": 0.25, "out_proj": 0.1}
SCHEMES = [FBI, TwoSided, ScaledSign, Sign, ParetoQ, OneBit]


def linear(inputs: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, 10, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.linspace(0.5, 2, inputs)[torch.randperm(inputs)]
    return layer


def choose(layer: DoubledInputs, inputs) -> None:
    """Let a layer have its second signs for other inputs."""
    chosen = torch.zeros(1, layer.in_features)
    chosen[0, list(inputs)] = 1
    layer.bitmap.copy_(pack_signs(chosen)[0])
    layer.read_bitmap_()


def grouped(plain: nn.Linear) -> GroupScale:
    return GroupScale(plain, group_size=12)


@pytest.mark.parametrize("scheme", [*SCHEMES, grouped], ids=lambda scheme: scheme.__name__)
def test_weight_and_gradients_are_those_of_two_planes(scheme):
    plain = linear()
    layer = DoubledInputs(plain, scheme, 0.3)
    k = 24 if scheme is grouped else 8
    error = (plain.weight.detach() - scheme(linear()).weight.detach()).square().sum(0)
    chosen = sorted(range(24), key=lambda i: -error[i])[:k]
    assert layer.doubled.tolist() == sorted(chosen) and layer.binary.in_features == 24 + k
    residual = plain.weight.detach() - scheme(linear()).weight.detach()
    torch.testing.assert_close(layer.binary.latent, torch.cat([plain.weight, residual[:, layer.doubled]], 1))

    # The definition: a layer that reads those inputs twice.
    inner = layer.binary
    x, direction = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 10)
    twice = torch.cat([x, x[..., layer.doubled]], -1)
    right = inner.finish(F.linear(twice, inner.weight, inner.bias))
    expected = torch.autograd.grad((right * direction).sum(), [x, *inner.parameters()], allow_unused=True)
    y = layer(x)
    torch.testing.assert_close(y, right)
    found = torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()], allow_unused=True)
    torch.testing.assert_close(found, expected)
    spread = torch.zeros(24 + k, 24)
    spread[range(24), range(24)] = 1
    spread[range(24, 24 + k), layer.doubled] = 1
    torch.testing.assert_close(layer.weight, inner.weight @ spread)

    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), right)
        holder = pack_(nn.Sequential(layer))
        assert isinstance(layer.binary, PackedLinear)
        torch.testing.assert_close(holder(x), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.weight, inner.weight @ spread)


def test_under_autocast_one_product_has_the_weight_of_both_planes():
    layer, x = DoubledInputs(linear(), TwoSided, 0.3), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


def test_a_second_sign_brings_the_weight_nearer():
    plain = linear(128, bias=False)
    shares = (0.1, 0.5, 1.0)
    errors = [TwoSided(plain).weight, *(DoubledInputs(plain, TwoSided, share).weight for share in shares)]
    errors = [float((weight - plain.weight).detach().norm()) for weight in errors]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    ("inputs", "share", "scheme", "k"),
    [
        (24, 0.001, FBI, 8),
        (24, 0.6, FBI, 16),
        (24, 1, FBI, 24),
        (20, 0.1, FBI, 4),
        (12, 1.0, FBI, 12),
        (256, 0.15, FBI, 40),
        (256, 0.15, GroupScale, 128),
        (256, 0.15, lambda plain: GroupScale(plain, None), 40),
    ],
)
def test_signs_fill_bytes_and_groups(inputs, share, scheme, k):
    layer = DoubledInputs(linear(inputs), scheme, share)
    assert len(layer.doubled) == k == layer.binary.in_features - inputs


@pytest.mark.parametrize("inputs", [24, 20])
def test_what_is_saved_of_the_choice_is_a_bit_an_input(inputs):
    layer = DoubledInputs(linear(inputs), FBI, 0.2)
    state = layer.state_dict()
    assert state["bitmap"].dtype == torch.uint8 and state["bitmap"].shape == (3,) and "doubled" not in state
    bits = [int(state["bitmap"][i // 8]) >> i % 8 & 1 for i in range(24)]
    assert [i for i, bit in enumerate(bits) if bit] == layer.doubled.tolist()

    others = list(range(inputs))[1::2][: len(layer.doubled)]
    choose(layer, others)
    x = torch.randn(3, inputs)
    with torch.device("meta"):
        empty = DoubledInputs(nn.Linear(inputs, 10), FBI, 0.2)
    assert empty.doubled.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    materialized = DoubledInputs(nn.Linear(inputs, 10, device="meta"), FBI, 0.2).to_empty(device="cpu")
    materialized.load_state_dict(layer.state_dict())
    for again in (layer, copy.deepcopy(layer), empty, materialized):
        assert again.doubled.tolist() == others and again.doubled.device.type == "cpu"
        assert torch.equal(again(x), layer(x))
    half = layer.half().double()
    assert half.doubled.tolist() == others and half.bitmap.dtype == torch.uint8
    assert layer.to("meta").doubled.is_meta


def test_another_number_of_chosen_inputs_than_the_layer_has_is_refused():
    model = nn.Sequential(DoubledInputs(linear(), FBI, 0.3))
    state, before = model.state_dict(), model[0].doubled.clone()
    for number, byte in ((0, 0), (24, 255)):
        wrong = state | {"0.bitmap": torch.full((3,), byte, dtype=torch.uint8)}
        for assign in (False, True):
            again = copy.deepcopy(model)
            with pytest.raises(UserError, match=rf"0\.bitmap chooses {number} inputs, and the layer has .* for 8"):
                again.load_state_dict(wrong, assign=assign)
    model.load_state_dict(state)
    assert torch.equal(model[0].doubled, before)


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan"), "0.1"])
def test_what_cannot_be_is_refused_in_a_sentence(make, bad):
    lm = make()
    with pytest.raises(UserError, match=r"layers.0.mixer.in_proj: double_inputs: the share must be a number above 0"):
        binarize_(lm, FBI, double_inputs={"in_proj": bad})
    assert not list(quantized_layers(lm)), "the model is as it was"


def test_layers_that_cannot_have_it_are_refused_in_a_sentence(make):
    with pytest.raises(UserError, match="double_inputs: 'in_porj' matches no layer that is made binary"):
        binarize_(make(), FBI, double_inputs={"in_porj": 0.1})
    with pytest.raises(UserError, match="a Ternary is not trained with one sign a weight"):
        binarize_(make(), Ternary, double_inputs=SHARES)
    with pytest.raises(UserError, match="no part of 3 inputs beside them makes a multiple of 8"):
        DoubledInputs(linear(3), FBI, 0.5)


def test_true_bits_are_those_of_both_planes_scales_and_the_choice(make, tmp_path):
    lm = binarize_(make(), TwoSided, double_inputs={"in_proj": 0.25, "*.1.mixer.in_proj": 0.5})
    layers = dict(quantized_layers(lm))
    assert len(layers) == 4
    layer = layers["backbone.layers.0.mixer.in_proj"]
    outputs = layer.out_features
    assert layer.storage() == {"signs": outputs * 40, "in_scale": 16 * 40, "out_scale": 16 * outputs, "doubled": 32}
    assert len(layers["backbone.layers.1.mixer.in_proj"].doubled) == 16
    storage, counted = storage_by_part(lm), count_parameters(lm)
    assert storage["doubled"] == 2 * 32 and sum(storage.values()) == true_bits(lm)
    assert counted.binarized == sum(found.in_features * found.out_features for found in layers.values())
    assert count_parameters(pack_(lm)) == counted and storage_by_part(lm) == storage
    deployed_(lm).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert sum(8 * t.nbytes if t.dtype == torch.uint8 else 16 * t.numel() for t in stored) == true_bits(lm)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("mixer", "scheme"), [("mamba2", TwoSided), ("mamba", FBI), ("mamba2", OneBit)])
def test_a_saved_model_comes_back(make, tmp_path, mixer, scheme, packed):
    lm = binarize_(make(mixer=mixer), scheme, keep_rows={"*.1.*.in_proj": ["z"]}, double_inputs=SHARES).eval()
    both = lm.backbone.layers[1].mixer.in_proj
    assert isinstance(both, KeptRows) and isinstance(both.binary, DoubledInputs)
    latent, sizes = lm(IDS).logits, (count_parameters(lm), storage_by_part(lm))
    lm = pack_(lm) if packed else lm
    assert (count_parameters(lm), storage_by_part(lm)) == sizes
    torch.testing.assert_close(lm(IDS).logits, latent, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for module in lm.modules():  # another choice than a fresh model would make
            if isinstance(module, DoubledInputs):
                choose(module, range(len(module.doubled)))
    lm.save_pretrained(tmp_path)
    again = MambaLM.from_pretrained(tmp_path).eval()
    assert describe(again) == describe(lm)
    assert torch.equal(again(IDS).logits, lm(IDS).logits)
    assert torch.equal(copy_in_fp32(lm).eval()(IDS).logits, lm(IDS).logits)
    with torch.no_grad():
        first, state = lm.prefill(IDS[:, :-1], lm.init_state(2))
        last, _ = lm.step(IDS[:, -1], state)
        torch.testing.assert_close(torch.cat([first, last[:, None]], 1), lm(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_wrong_description_is_refused(make):
    (entry, *rest) = describe_binarization(binarize_(make(), FBI, double_inputs={"in_proj": 0.25}))
    assert entry["doubled_inputs"] == 0.25 and "doubled_inputs" not in rest[0]
    for wrong in (None, [0.25], 2):
        with pytest.raises(UserError, match="the share must be a number above 0"):
            apply_binarization_(make(), [entry | {"doubled_inputs": wrong}, *rest])


@pytest.mark.parametrize("scheme", [FBI, ScaledSign, TwoSided])
@pytest.mark.parametrize("way", ["rows", "mix"])
def test_before_anything_is_binary_the_weight_is_what_it_was(scheme, way):
    whole = linear(32)
    layer = DoubledInputs(whole, scheme, 0.5)
    layer.binary.unfinished = Unfinished(way, 0.0)
    torch.testing.assert_close(layer.weight, whole.weight)
    layer.binary.unfinished = Unfinished(way, 1.0)
    end = layer.weight
    layer.binary.unfinished = None
    torch.testing.assert_close(end, layer.weight)


@pytest.mark.parametrize("way", ["rows", "mix", "tanh"])
def test_a_layer_on_its_way_to_binary_comes_back_there(make, way):
    lm = binarize_(make(), TwoSided, double_inputs=SHARES)
    for _, layer in binary_layers(lm):
        layer.unfinished = Unfinished(way, 0.25)
    again = build(json.loads(json.dumps(describe(lm))))
    again.load_state_dict(lm.state_dict())
    assert describe(again) == describe(lm) and torch.equal(again(IDS).logits, lm(IDS).logits)
    with pytest.raises(UserError, match="not binary yet"):
        pack_(lm)


def test_what_others_read(make, error, tmp_path):
    lm = binarize_(make(), ScaledSign, double_inputs=SHARES).eval()
    path = tmp_path / "model"
    lm.save_pretrained(path)
    for form in ("transformers", "state-spaces"):
        convert(path, tmp_path / form, form, dtype="float32")
        dense = MambaLM.from_pretrained(tmp_path / form)
        assert not list(quantized_layers(dense)) and error(dense(IDS).logits, lm(IDS).logits) < 1e-5
    with pytest.raises(UserError, match="in_proj has a second sign for 8 of its inputs, .* convert to packed"):
        convert(path, tmp_path / "bi", "bi-mamba")
    convert(path, tmp_path / "packed", "packed", dtype="float32")
    packed = MambaLM.from_pretrained(tmp_path / "packed")
    assert all(isinstance(innermost(layer), PackedLinear) for _, layer in quantized_layers(packed))
    assert error(packed(IDS).logits, lm(IDS).logits) < 1e-5


def test_a_post_training_result_trained_on_starts_near():
    plain = linear(bias=False)
    result = PTBLinear(plain, ptb.ScaledSign(), ptb.ScaledSign().fit(plain.weight.detach()).parts)
    weight, model = result.weight.clone(), nn.ModuleDict({"in_proj": result})
    assert retrain_(model, TwoSided, ["in_proj"], double_inputs={"in_proj": 0.25}) == (0, 1)
    layer = model["in_proj"]
    torch.testing.assert_close(layer.weight, weight, rtol=0.1, atol=1e-5)
    layer(torch.randn(3, 24)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
