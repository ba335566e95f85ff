"""A second sign for some inputs: which, the weight, its gradients, its bits, and where it goes."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
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
from bimamba_lit.binarize.wrapper import linear_of
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import convert
from bimamba_lit.models.checkpoint import build, copy_in_fp32, describe
from bimamba_lit.models.count import count_parameters, storage_by_part, true_bits
from bimamba_lit.models.deployed import deployed_
from bimamba_lit.models.weight_files import write_safetensors
from bimamba_lit.ops import pack_signs

IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
WIDTH = 64  # in_proj has two words of inputs, out_proj four
SHARES = {"in_proj": 0.25, "out_proj": 0.1}
SCHEMES = [FBI, TwoSided, ScaledSign, Sign, ParetoQ, OneBit]


def linear(inputs: int = 192, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, 10, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.linspace(0.5, 2, inputs)[torch.randperm(inputs)]
    return layer


def inputs_of(words) -> list[int]:
    return [32 * word + place for word in words for place in range(32)]


def choose(layer: DoubledInputs, words) -> None:
    """Let a layer have its second signs for the inputs of other words."""
    chosen = torch.zeros(1, layer.in_features // 32)
    chosen[0, list(words)] = 1
    layer.bitmap.copy_(pack_signs(chosen)[0])
    layer.read_bitmap_()


def grouped(plain: nn.Linear) -> GroupScale:
    return GroupScale(plain, group_size=48)


@pytest.mark.parametrize("scheme", [*SCHEMES, grouped], ids=lambda scheme: scheme.__name__)
def test_weight_and_gradients_are_those_of_two_planes(scheme):
    plain = linear()
    layer = DoubledInputs(plain, scheme, 0.4)
    k = 96 if scheme is grouped else 64
    residual = plain.weight.detach() - scheme(linear()).weight.detach()
    squares = residual.square().sum(0).tolist()
    words = sorted(range(6), key=lambda word: -sum(squares[i] for i in inputs_of([word])))[: k // 32]
    assert layer.doubled.tolist() == inputs_of(sorted(words)) and layer.binary.in_features == 192 + k
    torch.testing.assert_close(layer.binary.latent, torch.cat([plain.weight, residual[:, layer.doubled]], 1))

    # The definition: a layer that reads those inputs twice.
    inner = layer.binary
    x, direction = torch.randn(2, 5, 192, requires_grad=True), torch.randn(2, 5, 10)
    twice = torch.cat([x, x[..., layer.doubled]], -1)
    right = inner.finish(F.linear(twice, inner.weight, inner.bias))
    expected = torch.autograd.grad((right * direction).sum(), [x, *inner.parameters()], allow_unused=True)
    y = layer(x)
    torch.testing.assert_close(y, right)
    found = torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()], allow_unused=True)
    torch.testing.assert_close(found, expected)
    spread = torch.zeros(192 + k, 192)
    spread[range(192), range(192)] = 1
    spread[range(192, 192 + k), layer.doubled] = 1
    torch.testing.assert_close(layer.weight, inner.weight @ spread)

    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), right)
        holder = pack_(nn.Sequential(layer))
        assert isinstance(layer.binary, PackedLinear)
        torch.testing.assert_close(holder(x), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.weight, inner.weight @ spread)


def test_the_worst_words_count_and_not_the_worst_inputs():
    plain = linear(96)
    with torch.no_grad():
        plain.weight.sign_()  # which leaves no residual, but
        plain.weight[:, 5] *= 4  # one large one
        plain.weight[:, 64:] *= 1.8  # and many small ones, more in all
    assert DoubledInputs(plain, Sign, 0.4).doubled.tolist() == list(range(64, 96))
    with torch.no_grad():
        plain.weight[:, 5] *= 2
    assert DoubledInputs(plain, Sign, 0.4).doubled.tolist() == list(range(32))
    assert DoubledInputs(plain, Sign, 0.7).doubled.tolist() == [*range(32), *range(64, 96)]


def test_under_autocast_one_product_has_the_weight_of_both_planes():
    layer, x = DoubledInputs(linear(), TwoSided, 0.4), torch.randn(3, 192)
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
        (32, 0.001, FBI, 32),
        (192, 0.001, FBI, 32),
        (192, 1, FBI, 192),
        (512, 0.6, FBI, 320),
        (1536, 0.6, FBI, 928),
        (3200, 0.29, FBI, 928),
        (256, 0.15, FBI, 32),
        (256, 0.15, GroupScale, 128),
        (256, 0.9, GroupScale, 256),
        (192, 0.3, grouped, 96),
        (256, 0.15, lambda plain: GroupScale(plain, None), 32),
    ],
)
def test_signs_fill_words_and_groups(inputs, share, scheme, k):
    layer = DoubledInputs(linear(inputs), scheme, share)
    assert len(layer.doubled) == k == layer.binary.in_features - inputs


@pytest.mark.parametrize(
    ("mixer", "share"), [("mamba2", 0.6), ("mamba", 0.5)], ids=["the best recipe", "the best recipe on Mamba-1"]
)
def test_it_takes_at_most_a_bit_and_a_quarter_a_weight(mixer, share):
    config = MambaConfig(vocab_size=257, d_model=256, n_layer=4, mixer=mixer)
    with torch.device("meta"):
        lm = binarize_(MambaLM(config), FBI, double_inputs={"out_proj": share})
    layers = [layer for _, layer in quantized_layers(lm)]
    bits = sum(sum(layer.storage().values()) for layer in layers)
    weights = sum(layer.weight.numel() for layer in layers)
    assert 1.2 < bits / weights <= 1.25


@pytest.mark.parametrize("pattern", ["column", "two_sided"])
def test_both_signs_of_an_input_share_its_shift(pattern):
    plain, scheme = linear(), partial(FBI, pattern=pattern)
    layer = DoubledInputs(plain, scheme, 0.4)
    apart = scheme(linear_of(layer.binary.latent))
    first, second = apart.in_shift.detach().split([192, 64])
    torch.testing.assert_close(layer.binary.in_shift.detach(), first.index_add(0, layer.doubled, second))
    assert layer.binary.in_shift._no_weight_decay and layer.state_dict()["binary.in_shift"].shape == (192,)
    assert layer.storage()["in_shift"] == 16 * 192 and layer.storage()["in_scale"] == 16 * 256
    once, again = apart.weight.detach().split([192, 64], 1)
    torch.testing.assert_close(layer.weight.detach(), once.index_add(1, layer.doubled, again))
    upstream = torch.randn(10, 192)
    (layer.weight * upstream).sum().backward()
    torch.testing.assert_close(layer.binary.in_shift.grad, upstream.sum(0))
    before, storage = layer.weight.detach(), layer.storage()
    pack_(layer)
    assert layer.storage() == storage and layer.binary.in_shift.shape == (192,)
    torch.testing.assert_close(layer.weight, before)


@pytest.mark.parametrize("inputs", [96, 256, 288])
def test_what_is_saved_of_the_choice_is_a_bit_a_word(inputs):
    layer = DoubledInputs(linear(inputs), FBI, 0.2)
    state = layer.state_dict()
    assert state["bitmap"].dtype == torch.uint8 and state["bitmap"].shape == (-(-inputs // 256),)
    assert "doubled" not in state
    assert layer.storage()["doubled"] == 8 * state["bitmap"].nbytes
    bits = [int(byte) >> place & 1 for byte in state["bitmap"] for place in range(8)]
    assert inputs_of(word for word, bit in enumerate(bits) if bit) == layer.doubled.tolist()

    words = range(inputs // 32)[1::2][: len(layer.doubled) // 32]
    others = inputs_of(words)
    choose(layer, words)
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
    model = nn.Sequential(DoubledInputs(linear(), FBI, 0.4))
    state, before = model.state_dict(), model[0].doubled.clone()
    for number, byte in ((0, 0), (192, 255)):
        wrong = state | {"0.bitmap": torch.full((1,), byte, dtype=torch.uint8)}
        for assign in (False, True):
            again = copy.deepcopy(model)
            with pytest.raises(UserError, match=rf"0\.bitmap chooses {number} inputs, and the layer has .* for 64"):
                again.load_state_dict(wrong, assign=assign)
    model.load_state_dict(state)
    assert torch.equal(model[0].doubled, before)


def test_a_model_that_chose_single_inputs_is_refused_in_a_sentence(make, tmp_path):
    lm = binarize_(make(d_model=WIDTH), FBI, double_inputs=SHARES)
    lm.save_pretrained(tmp_path)
    name, file = "backbone.layers.0.mixer.in_proj.bitmap", tmp_path / "model.safetensors"
    single = {name: torch.tensor([255] * 4 + [0] * 4, dtype=torch.uint8)}
    with pytest.raises(UserError, match=rf"^{name} chooses single inputs, .* whole words of 32: train the model again"):
        lm.load_state_dict(lm.state_dict() | single)
    write_safetensors(load_file(file) | single, file)
    with pytest.raises(UserError, match=rf": {name} chooses single inputs"):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [-0.1, 1.01, float("nan"), "0.1"])
def test_what_cannot_be_is_refused_in_a_sentence(make, bad):
    lm = make()
    with pytest.raises(UserError, match=r"layers.0.mixer.in_proj: double_inputs: the share must be a number above 0"):
        binarize_(lm, FBI, double_inputs={"in_proj": bad})
    assert not list(quantized_layers(lm)), "the model is as it was"


def test_a_list_is_of_shares_by_depth(make):
    lm = binarize_(make(d_model=WIDTH, n_layer=5), FBI, double_inputs={"out_proj": [1, 0.25, 0.5], "in_proj": [0.25]})
    mixers = [block.mixer for block in lm.backbone.layers]
    assert [mixer.out_proj.share for mixer in mixers] == [1, 1, 0.25, 0.25, 0.5]
    assert [len(mixer.in_proj.doubled) for mixer in mixers] == [32] * 5
    lm = binarize_(make(d_model=WIDTH), FBI, double_inputs={"out_proj": [0.25, 0.5, 0.75, 1]})
    assert [block.mixer.out_proj.share for block in lm.backbone.layers] == [0.25, 0.75], "a list for a deeper model"
    lm = binarize_(make(d_model=WIDTH), FBI, double_inputs={"out_proj": 0.5, "*_proj": [0.25, 0]})
    shares = [(getattr(b.mixer.in_proj, "share", 0), getattr(b.mixer.out_proj, "share", 0)) for b in lm.backbone.layers]
    assert shares == [(0.25, 0.25), (0, 0)], "the last pattern counts, and 0 is none"


def test_an_empty_list_is_refused(make):
    with pytest.raises(UserError, match=r"double_inputs: 'out_proj' has an empty list"):
        binarize_(make(), FBI, double_inputs={"out_proj": []})


def test_layers_that_cannot_have_it_are_refused_in_a_sentence(make):
    with pytest.raises(UserError, match="double_inputs: 'in_porj' matches no layer that is made binary"):
        binarize_(make(), FBI, double_inputs={"in_porj": 0.1})
    with pytest.raises(UserError, match="a Ternary is not trained with one sign a weight"):
        binarize_(make(), Ternary, double_inputs=SHARES)
    with pytest.raises(UserError, match="so a layer must have a multiple of 32 inputs, and 48 is none"):
        DoubledInputs(linear(48), FBI, 0.5)
    with pytest.raises(UserError, match="so a layer must have a multiple of 96 inputs, and 48 is none"):
        DoubledInputs(linear(48), grouped, 0.5)
    lm = make(d_model=48)
    with pytest.raises(UserError, match="layers.0.mixer.in_proj: double_inputs: .* multiple of 32 inputs, and 48 is"):
        binarize_(lm, FBI, double_inputs=SHARES)
    assert not list(quantized_layers(lm)), "the model is as it was"


def test_true_bits_are_those_of_both_planes_scales_and_the_choice(make, tmp_path):
    lm = binarize_(make(d_model=WIDTH), TwoSided, double_inputs={"in_proj": 0.25, "*.1.mixer.in_proj": 1})
    layers = dict(quantized_layers(lm))
    assert len(layers) == 4
    layer = layers["backbone.layers.0.mixer.in_proj"]
    outputs = layer.out_features
    assert layer.storage() == {"signs": outputs * 96, "in_scale": 16 * 96, "out_scale": 16 * outputs, "doubled": 8}
    assert len(layers["backbone.layers.1.mixer.in_proj"].doubled) == 64
    storage, counted = storage_by_part(lm), count_parameters(lm)
    assert storage["doubled"] == 2 * 8 and sum(storage.values()) == true_bits(lm)
    assert counted.binarized == sum(found.in_features * found.out_features for found in layers.values())
    assert count_parameters(pack_(lm)) == counted and storage_by_part(lm) == storage
    deployed_(lm).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert sum(8 * t.nbytes if t.dtype == torch.uint8 else 16 * t.numel() for t in stored) == true_bits(lm)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("mixer", "scheme"), [("mamba2", TwoSided), ("mamba", FBI), ("mamba2", OneBit)])
def test_a_saved_model_comes_back(make, tmp_path, mixer, scheme, packed):
    lm = make(d_model=WIDTH, mixer=mixer)
    lm = binarize_(lm, scheme, keep_rows={"*.1.*.in_proj": ["z"]}, double_inputs=SHARES).eval()
    both = lm.backbone.layers[1].mixer.in_proj
    assert isinstance(both, KeptRows) and isinstance(both.binary, DoubledInputs)
    latent, sizes = lm(IDS).logits, (count_parameters(lm), storage_by_part(lm))
    lm = pack_(lm) if packed else lm
    assert (count_parameters(lm), storage_by_part(lm)) == sizes
    torch.testing.assert_close(lm(IDS).logits, latent, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for module in lm.modules():  # another choice than a fresh model would make
            if isinstance(module, DoubledInputs):
                choose(module, range(len(module.doubled) // 32))
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
    for wrong in (None, [2], 2):
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
    lm = binarize_(make(d_model=WIDTH), TwoSided, double_inputs=SHARES)
    for _, layer in binary_layers(lm):
        layer.unfinished = Unfinished(way, 0.25)
    again = build(json.loads(json.dumps(describe(lm))))
    again.load_state_dict(lm.state_dict())
    assert describe(again) == describe(lm) and torch.equal(again(IDS).logits, lm(IDS).logits)
    with pytest.raises(UserError, match="not binary yet"):
        pack_(lm)


def test_what_others_read(make, error, tmp_path):
    lm = binarize_(make(d_model=WIDTH), ScaledSign, double_inputs=SHARES).eval()
    path = tmp_path / "model"
    lm.save_pretrained(path)
    for form in ("transformers", "state-spaces"):
        convert(path, tmp_path / form, form, dtype="float32")
        dense = MambaLM.from_pretrained(tmp_path / form)
        assert not list(quantized_layers(dense)) and error(dense(IDS).logits, lm(IDS).logits) < 1e-5
    with pytest.raises(UserError, match="in_proj has a second sign for 32 of its inputs, .* convert to packed"):
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
    layer(torch.randn(3, 192)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
