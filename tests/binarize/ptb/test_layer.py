"""The layer that holds a post-training result: its weight, its true size, packing, saving, and training on from it."""

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bimamba_lit import MambaConfig, MambaLM, binarize
from bimamba_lit.binarize import (
    FBI,
    BinaryLinear,
    PackedLinear,
    PTBLinear,
    apply_binarization_,
    binarize_,
    describe_binarization,
    known_schemes,
    pack_,
    ptb,
    quantized_layers,
    retrain_,
)
from bimamba_lit.errors import UserError
from bimamba_lit.models.count import count_parameters, storage_by_part, true_bits

SCHEMES = [
    scheme
    for name, scheme in known_schemes(ptb.PTBScheme).items()
    if name in ptb.__all__ and not scheme.__abstractmethods__
]
SINGLE = [ptb.Sign(), ptb.ScaledSign(), ptb.ScaledSign(centred_rows=True), ptb.GPTQ(bits=1, group_size=None)]


def lm_of(d_model=64):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=40, d_model=d_model, n_layer=2, headdim=8, d_state=8, chunk_size=8)).eval()


IDS = torch.randint(0, 40, (8, 32), generator=torch.Generator().manual_seed(1))


def fitted(scheme, **sizes):
    return ptb.calibrate_(lm_of(**sizes), scheme, [IDS])


def layer_of(scheme, bias=True):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 48, bias), torch.randn(512, 256)
    return PTBLinear(linear, scheme, scheme.fit(linear.weight, 2 / 512 * x.T @ x).parts)


def bytes_of(tensors, path):
    """Write tensors and return the bytes that they take in the file, without its header."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    return path.stat().st_size - 8 - header


def test_every_scheme_is_tried_here():
    assert {scheme.__name__ for scheme in SCHEMES} >= {
        "Sign",
        "ScaledSign",
        "GPTQ",
        "BiLLM",
        "ARB",
        "ARBX",
        "ARBRC",
        "PBLLM",
    }


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.__name__)
def test_the_reported_bits_are_those_of_a_file(scheme, tmp_path):
    layer = layer_of(scheme())
    written = layer.parts | {"bias": layer.bias.half()}
    assert sum(layer.storage().values()) == 8 * bytes_of(written, tmp_path / "layer.safetensors")
    for name, bits in layer.storage().items():
        assert bits == 8 * bytes_of({name: written[name]}, tmp_path / "part.safetensors"), name


def deployed(lm):
    """Return a model's tensors as they are deployed: bits as they are, parts as they are, everything else in fp16."""
    lm = copy.deepcopy(lm)
    if any(isinstance(layer, BinaryLinear) for layer in lm.modules()):
        pack_(lm)
    parts = {
        f"{name}.{part}" for name, layer in quantized_layers(lm) if isinstance(layer, PTBLinear) for part in layer.parts
    }
    state = {name: tensor for name, tensor in lm.state_dict().items() if name != "lm_head.weight"}
    return {
        name: value if name in parts or not value.is_floating_point() else value.half() for name, value in state.items()
    }


TRAINED = [
    binarize.Sign,
    binarize.ScaledSign,
    FBI,
    lambda linear: FBI(linear, "row"),
    lambda linear: FBI(linear, "single"),
]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda scheme=scheme: binarize_(lm_of(), scheme) for scheme in TRAINED),
        lambda: binarize_(lm_of(), FBI, double_inputs={"out_proj": 0.6}),
        lambda: fitted(ptb.GPTQ(3, 64)),
        lm_of,
    ],
    ids=["Sign", "ScaledSign", "FBI", "FBI by row", "FBI single", "FBI, second signs", "ptb.GPTQ", "fp"],
)
def test_the_bits_of_a_model_are_those_of_a_file(make, tmp_path):
    lm = make()
    assert true_bits(lm) == 8 * bytes_of(deployed(lm), tmp_path / "model.safetensors")
    by_part = storage_by_part(lm)
    dense = {
        name for name in deployed(lm) if not any(name.startswith(f"{layer}.") for layer, _ in quantized_layers(lm))
    }
    rest = {name: tensor for name, tensor in deployed(lm).items() if name in dense}
    assert by_part["full_precision"] == 8 * bytes_of(rest, tmp_path / "rest.safetensors")


def test_the_weights_of_a_model_are_counted_once():
    plain, lm = count_parameters(lm_of()), fitted(ptb.GPTQ(2, 32))
    layers = [layer for _, layer in quantized_layers(lm)]
    total, binarized = count_parameters(lm)
    assert binarized == sum(layer.in_features * layer.out_features for layer in layers)
    assert total == plain.total + sum(layer.scales.numel() for layer in layers)


def test_the_weight_is_what_the_parts_say_in_the_models_dtype():
    layer = layer_of(ptb.GPTQ(2))
    parts = {name: part.clone() for name, part in layer.parts.items()}
    dense, x = layer.weight, torch.randn(3, 256)
    assert layer.weight is dense and dense.dtype == torch.float32
    assert torch.equal(dense, ptb.GPTQ(2).decode(parts, 48, 256))
    assert torch.equal(layer(x), x @ dense.T + layer.bias) and torch.equal(layer.dense()(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and torch.equal(half.weight, dense.to(torch.bfloat16))
    for moved in (half, half.double(), half.to("cpu")):
        assert all(
            torch.equal(part, parts[name]) and part.dtype == parts[name].dtype for name, part in moved.parts.items()
        )
    assert torch.equal(half.float().weight, dense)
    assert layer.train()._kept._formed is None


def test_the_weight_follows_the_parts():
    layer, other = layer_of(ptb.ScaledSign()), layer_of(ptb.ScaledSign())
    other.scales.mul_(2)
    before = layer.weight
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, 2 * before)
    layer.scales.mul_(2)
    assert torch.equal(layer.weight, 4 * before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.__name__)
def test_a_saved_model_is_the_same_model(scheme, tmp_path):
    lm = fitted(scheme() if scheme is not ptb.GPTQ else scheme(group_size=32))
    lm.save_pretrained(tmp_path)
    read = MambaLM.from_pretrained(tmp_path)
    assert describe_binarization(read) == describe_binarization(lm)
    assert torch.equal(read(IDS).logits, lm(IDS).logits) and true_bits(read) == true_bits(lm)
    assert describe_binarization(lm)[0]["scheme"] == f"ptb.{scheme.__name__}"


@pytest.mark.parametrize("scheme", SINGLE, ids=repr)
def test_results_of_one_sign_a_weight_pack(scheme, tmp_path):
    lm = fitted(scheme)
    logits = lm(IDS).logits
    packed = pack_(copy.deepcopy(lm))
    assert sum(isinstance(layer, PackedLinear) for layer in packed.modules()) == 4
    torch.testing.assert_close(packed(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path)
    read = MambaLM.from_pretrained(tmp_path)
    assert describe_binarization(read) == describe_binarization(packed)
    assert torch.equal(read(IDS).logits, packed(IDS).logits)


def test_more_than_one_sign_a_weight_does_not_pack_and_stays_as_it_is():
    lm = fitted(ptb.GPTQ(2, 32))
    modules = list(lm.modules())
    with pytest.raises(UserError, match="ptb.GPTQ .*'bits': 2.* holds more than one sign a weight.*cannot be packed"):
        pack_(lm)
    assert modules == list(lm.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "ptb.GPTO"}, "did you mean 'ptb.GPTQ'"),
        ({"options": {"bit": 2}}, "does not take the options"),
        ({"options": {"bits": 5}}, "GPTQ's bits are one of"),
        ({"parts": None}, "must each have a dtype"),
        ({"parts": {"codes": ["object", [4]]}}, "must each have a dtype"),
        ({"parts": {"codes": ["uint8", ["x"]]}}, "must each have a dtype"),
        ({"targets": ["no_such_layer"]}, "matches no Linear layer"),
    ],
)
def test_a_wrong_description_is_refused(change, message):
    (good, *_) = json.loads(json.dumps(describe_binarization(fitted(ptb.GPTQ(2, 32)))))
    with pytest.raises(UserError, match=message):
        apply_binarization_(lm_of(), [good | change])


def by_row(linear):
    return FBI(linear, pattern="row")


def by_group(linear):
    return binarize.GroupScale(linear, group_size=32)


@pytest.mark.parametrize(
    ("scheme", "trained", "exact"),
    [
        (ptb.Sign(), binarize.Sign, True),
        (ptb.ScaledSign(), binarize.ScaledSign, True),
        (ptb.ScaledSign(), by_row, True),
        (ptb.ScaledSign(centred_rows=True), by_row, True),
        (ptb.GPTQ(bits=1, group_size=None), by_row, True),
        (ptb.Sign(), by_row, True),
        (ptb.ScaledSign(), by_group, True),
        (ptb.ScaledSign(), binarize.TwoSided, True),
        (ptb.ScaledSign(), binarize.ParetoQ, True),
        (ptb.ScaledSign(), FBI, False),
        (ptb.ScaledSign(), binarize.Sign, False),
        (ptb.GPTQ(bits=2, group_size=32), by_row, False),
        (ptb.ARBRC(), FBI, False),
        (ptb.ARBRC(), binarize.TwoSided, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_training_starts_from_a_result(scheme, trained, exact):
    lm = fitted(scheme)
    results = {name: layer for name, layer in quantized_layers(lm)}
    logits = lm(IDS).logits
    assert retrain_(lm, trained) == ((4, 0) if exact else (0, 4))
    for name, result in results.items():
        layer = lm.get_submodule(name)
        assert isinstance(layer, BinaryLinear)
        if exact:
            torch.testing.assert_close(layer.weight, result.weight, rtol=1e-6, atol=0)
            assert torch.equal(layer.packed_signs(), result.packed_signs())
        else:
            assert torch.equal(layer.latent, result.weight)
    if exact:
        torch.testing.assert_close(lm(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    lm(IDS).logits.sum().backward()
    assert all(lm.get_submodule(name).latent.grad.abs().sum() > 0 for name in results)


def test_a_result_becomes_dense_without_a_scheme():
    lm = fitted(ptb.GPTQ(4, 32))
    logits = lm(IDS).logits
    assert retrain_(lm, None) == (0, 0) and not list(quantized_layers(lm))
    assert torch.equal(lm(IDS).logits, logits)
