"""Rows of a binary layer that stay in full precision: the weight, its gradients, its bits, and where it goes."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bimamba_lit import MambaLM
from bimamba_lit.binarize import (
    FBI,
    BinaryLinear,
    KeptRows,
    OneBit,
    PackedLinear,
    PTBLinear,
    ScaledSign,
    Ternary,
    Unfinished,
    apply_binarization_,
    binarize_,
    binary_layers,
    describe_binarization,
    pack_,
    ptb,
    quantized_layers,
    retrain_,
)
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import convert
from bimamba_lit.models.checkpoint import build, describe
from bimamba_lit.models.count import count_parameters, storage_by_part, true_bits
from bimamba_lit.models.deployed import deployed_

ROWS = {"a": 3, "b": 2, "c": 4, "d": 1}
IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
KEEP = {"in_proj": ["B", "C", "dt"]}


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 10, bias=bias)


def which(names) -> torch.Tensor:
    """A mask of the rows of these names, by the plain definition."""
    return torch.tensor([name in names for name, size in ROWS.items() for _ in range(size)])


CHOICES = [["d"], ["a"], ["c", "d"], ["b"], ["a", "c"], ["d", "b"]]


@pytest.mark.parametrize("names", CHOICES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_some_rows_are_as_they_were_and_the_others_a_layer_of_the_scheme(names, bias):
    plain, kept = linear(bias), which(names)
    layer = KeptRows(plain, FBI, ROWS, names)
    part = nn.Linear(16, 10 - len(layer.kept), bias=False)
    part.weight = nn.Parameter(plain.weight[~kept].detach())
    expected = torch.empty(10, 16)
    expected[kept], expected[~kept] = plain.weight[kept].detach(), FBI(part).weight.detach()
    assert torch.equal(layer.weight, expected)
    x = torch.randn(2, 5, 16)
    right = F.linear(x, expected, plain.bias)
    torch.testing.assert_close(layer(x), right)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), right)
        holder = pack_(nn.Sequential(layer))
        assert isinstance(layer.binary, PackedLinear)
        torch.testing.assert_close(holder(x), right)
        torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("names", [["d"], ["a", "c"]], ids=str)
def test_gradients_are_those_of_both_parts(names):
    plain, kept = linear(), which(names)
    layer = KeptRows(plain, FBI, ROWS, names)
    x, direction = torch.randn(7, 16, requires_grad=True), torch.randn(7, 10)
    (layer(x) * direction).sum().backward()
    found = x.grad.clone()
    torch.testing.assert_close(layer.kept.grad, direction[:, kept].t() @ x.detach())
    alone = FBI(nn.Linear(16, int((~kept).sum()), bias=False))
    alone.load_state_dict(layer.binary.state_dict())
    y = x.detach().requires_grad_()
    ((alone(y) * direction[:, ~kept]).sum() + (F.linear(y, layer.kept.detach()) * direction[:, kept]).sum()).backward()
    torch.testing.assert_close(found, y.grad)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(layer.binary.get_parameter(name).grad, parameter.grad, msg=name)


def test_a_scheme_that_does_more_than_multiply_does_so_here_too():
    class Halved(ScaledSign):
        def forward(self, x):
            return super().forward(x) / 2

    layer, x = KeptRows(linear(), Halved, ROWS, ["d"]), torch.randn(3, 16)
    torch.testing.assert_close(layer(x)[:, :9], layer.binary(x))
    torch.testing.assert_close(layer(x)[:, 9:], x @ layer.kept.t())


@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
def test_a_mixer_names_its_rows(make, kind):
    mixer = make(mixer=kind, ngroups=1 if kind == "mamba" else 2).backbone.layers[0].mixer
    x = torch.randn(1, 9, 32)
    found = {}
    for name, rows in mixer.projection_rows.items():
        layer = mixer.get_submodule(name)
        outputs = layer(x if name == "in_proj" else torch.randn(1, 9, 64).fill_(0.5))
        found[name] = dict(zip(rows, outputs.split(list(rows.values()), -1), strict=True))
    if kind == "mamba":
        read = dict(zip("xz", mixer.in_proj(x).chunk(2, -1), strict=True))
        _, b, c = mixer._select(torch.full((1, 9, 64), 0.5))
        torch.testing.assert_close([found["x_proj"][name] for name in "BC"], [b, c])
    else:
        z, xbc, dt = mixer._project(x)
        inner, b, c = (part.flatten(-2) for part in mixer._heads(xbc))
        read = {"z": z, "x": inner, "B": b, "C": c, "dt": dt}
    torch.testing.assert_close(found["in_proj"], read)


@pytest.mark.parametrize(
    ("options", "keep", "told"),
    [
        ({}, {"in_porj": ["dt"]}, "'in_porj' matches no layer that is made binary; did you mean 'in_proj'"),
        ({}, {"q": ["dt"]}, "'q' matches no layer that is made binary, which end in in_proj, out_proj$"),
        ({}, {"in_proj": ["DT"]}, r"in_proj: keep_rows: there are no rows 'DT'.*rows are z, x, B, C, dt"),
        ({"mixer": "mamba"}, {"in_proj": ["dt"]}, "in_proj: keep_rows: there are no rows 'dt'.*rows are x, z"),
        ({}, {"out_proj": ["x"]}, "rows of .*out_proj have no names: a Mamba2 has some for in_proj"),
        ({}, {"in_proj": ["z", "x", "B", "C", "dt"]}, "keep_rows: all of its rows are kept"),
    ],
)
def test_rows_that_are_not_there_are_refused_in_a_sentence(make, options, keep, told):
    lm = make(**options)
    with pytest.raises(UserError, match=told) as error:
        binarize_(lm, FBI, keep_rows=keep)
    assert "\n" not in str(error.value)
    assert not list(quantized_layers(lm)), "the model is as it was"


def test_no_names_keep_no_rows_and_patterns_add_up(make):
    lm = binarize_(make(), FBI, keep_rows={"in_proj": [], "*.0.mixer.in_proj": ["dt"], "*.0.*.in_proj": "B"})
    kept = {name: layer.names for name, layer in lm.named_modules() if isinstance(layer, KeptRows)}
    assert kept == {"backbone.layers.0.mixer.in_proj": ["B", "dt"]}


def test_targets_after_an_exclamation_mark_are_left_out(make):
    lm = binarize_(make(n_layer=3), FBI, ["in_proj", "out_proj", "!*.layers.0.*", "!*.2.mixer.out_proj"])
    names = [name.removeprefix("backbone.layers.") for name, _ in binary_layers(lm)]
    assert names == ["1.mixer.in_proj", "1.mixer.out_proj", "2.mixer.in_proj"]
    with pytest.raises(UserError, match="'outproj' matches no Linear layer"):
        binarize_(make(), FBI, ["in_proj", "!outproj"])
    with pytest.raises(UserError, match="leave nothing"):
        binarize_(make(), FBI, ["!out_proj"])


def test_true_bits_are_those_of_signs_scales_and_rows(make, tmp_path):
    lm = binarize_(make(), ScaledSign, keep_rows=KEEP)
    name, layer = next(quantized_layers(lm))
    rows = 8 + 8 + 4
    assert name == "backbone.layers.0.mixer.in_proj" and layer.kept.shape == (rows, 32)
    others = layer.out_features - rows
    assert layer.storage() == {"signs": 32 * others, "out_scale": 16 * others, "kept_rows": 16 * rows * 32}
    projections = [found for _, found in quantized_layers(lm)]
    assert len(projections) == 4
    storage = storage_by_part(lm)
    assert storage["kept_rows"] == 2 * 16 * rows * 32 and sum(storage.values()) == true_bits(lm)
    counted = count_parameters(lm)
    assert counted.binarized == sum(found.in_features * found.out_features for found in projections)
    assert count_parameters(pack_(lm)) == counted and storage_by_part(lm) == storage
    deployed = MambaLM.from_pretrained(_saved(deployed_(lm), tmp_path))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    narrow = sum(8 * t.nbytes if t.dtype == torch.uint8 else 16 * t.numel() for t in stored.values())
    assert narrow == true_bits(deployed) == true_bits(lm)


def _saved(lm, folder):
    lm.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("mixer", "scheme"), [("mamba2", FBI), ("mamba", FBI), ("mamba2", Ternary), ("mamba2", OneBit)]
)
def test_a_saved_model_comes_back(make, tmp_path, mixer, scheme, packed):
    keep = {"in_proj": ["z"], "x_proj": ["dt", "C"]} if mixer == "mamba" else {"*.1.mixer.in_proj": ["z", "dt"]}
    targets = ["in_proj", "out_proj", "x_proj"] if mixer == "mamba" else ["in_proj", "out_proj"]
    lm = binarize_(make(mixer=mixer), scheme, targets, keep).eval()
    counted, latent = (count_parameters(lm), storage_by_part(lm)), lm(IDS).logits
    lm = pack_(lm) if packed else lm
    assert (count_parameters(lm), storage_by_part(lm)) == counted
    torch.testing.assert_close(lm(IDS).logits, latent, rtol=1e-4, atol=1e-4)
    again = MambaLM.from_pretrained(_saved(lm, tmp_path)).eval()
    assert describe(again) == describe(lm)
    assert torch.equal(again(IDS).logits, lm(IDS).logits)
    copy = build(json.loads(json.dumps(describe(lm))))
    copy.load_state_dict(lm.state_dict())
    assert torch.equal(copy.eval()(IDS).logits, lm(IDS).logits)
    with torch.no_grad():
        state = lm.init_state(2)
        first, state = lm.prefill(IDS[:, :-1], state)
        last, _ = lm.step(IDS[:, -1], state)
        torch.testing.assert_close(torch.cat([first, last[:, None]], 1), lm(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["dt", [3], {"dt": 1}, ["DT"]])
def test_a_wrong_description_is_refused(make, wrong):
    (entry, *rest) = describe_binarization(binarize_(make(), FBI, keep_rows=KEEP))
    assert entry["kept_rows"] == ["B", "C", "dt"] and "kept_rows" not in rest[0]
    with pytest.raises(UserError, match="kept_rows of a scheme must be a list of names|there are no rows 'DT'"):
        apply_binarization_(make(), [entry | {"kept_rows": wrong}, *rest])


def test_a_layer_on_its_way_to_binary_comes_back_there(make):
    lm = binarize_(make(), FBI, keep_rows=KEEP)
    for _, layer in binary_layers(lm):
        layer.unfinished = Unfinished("mix", 0.25)
    again = build(json.loads(json.dumps(describe(lm))))
    again.load_state_dict(lm.state_dict())
    assert describe(again) == describe(lm) and torch.equal(again(IDS).logits, lm(IDS).logits)
    assert again.backbone.layers[0].mixer.in_proj.binary.unfinished.share == 0.25


def test_what_others_read(make, error, tmp_path):
    lm = binarize_(make(), ScaledSign, keep_rows=KEEP).eval()
    path = _saved(lm, tmp_path)
    for form in ("transformers", "state-spaces"):
        convert(path, tmp_path / form, form, dtype="float32")
        dense = MambaLM.from_pretrained(tmp_path / form)
        assert not list(quantized_layers(dense)) and error(dense(IDS).logits, lm(IDS).logits) < 1e-5
    with pytest.raises(UserError, match=r"in_proj has rows in full precision \(B, C, dt\), and the Bi-Mamba form"):
        convert(path, tmp_path / "bi", "bi-mamba")
    convert(path, tmp_path / "packed", "packed", dtype="float32")
    packed = MambaLM.from_pretrained(tmp_path / "packed")
    assert all(isinstance(layer, PackedLinear) for _, layer in binary_layers(packed))
    assert error(packed(IDS).logits, lm(IDS).logits) < 1e-5


def test_a_post_training_result_trained_on_keeps_rows_too(make):
    lm = make()
    for name, plain in list(lm.named_modules()):
        if name.endswith(("in_proj", "out_proj")):
            parts = ptb.ScaledSign().fit(plain.weight.detach()).parts
            lm.set_submodule(name, PTBLinear(plain, ptb.ScaledSign(), parts))
    weight = lm.backbone.layers[0].mixer.in_proj.weight.clone()
    assert retrain_(lm, ScaledSign, keep_rows=KEEP) == (2, 2), "out_proj is as it was, in_proj starts near"
    layer = lm.backbone.layers[0].mixer.in_proj
    assert isinstance(layer, KeptRows) and isinstance(layer.binary, BinaryLinear)
    torch.testing.assert_close(layer.weight, weight)
