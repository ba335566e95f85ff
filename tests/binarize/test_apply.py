"""Making models binary: targets, ties, other libraries' blocks, packing, descriptions."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import (
    FBI,
    BinaryLinear,
    PackedLinear,
    ScaledSign,
    Sign,
    Ternary,
    TwoBit,
    apply_binarization_,
    binarize_,
    describe_binarization,
    pack_,
)
from bimamba_lit.errors import UserError


def small_lm():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=20, headdim=8, d_state=8))


def binary_names(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)]


def test_default_targets_are_both_projections_of_every_mixer():
    lm = binarize_(small_lm(), FBI)
    layers = [f"backbone.layers.{n}.mixer.{part}" for n in (0, 1) for part in ("in_proj", "out_proj")]
    assert sorted(binary_names(lm)) == sorted(layers)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["out_proj"], 2),
        (["*.layers.1.*"], 2),
        (["backbone.layers.0.mixer.in_proj"], 1),
        ("in_proj", 2),
        (["*"], 4),  # lm_head only when named
        (["lm_head"], 1),
        (["*", "lm_head"], 5),
    ],
)
def test_targets_are_patterns_on_the_name_or_its_last_part(targets, expected):
    assert len(binary_names(binarize_(small_lm(), FBI, targets))) == expected


def test_a_target_that_matches_nothing_names_the_nearest_and_changes_nothing():
    lm = small_lm()
    with pytest.raises(UserError, match="'in_porj' matches no Linear layer.*did you mean 'in_proj'"):
        binarize_(lm, FBI, ["out_proj", "in_porj"])
    assert not binary_names(lm)


def test_twice_is_an_error():
    lm = binarize_(small_lm(), FBI)
    words = r"of few bits already \(FBI\); start from a full-precision model, or train this one on as it is"
    with pytest.raises(UserError, match=f"'in_proj' matches no full-precision Linear layer.*{words}"):
        binarize_(lm, Sign)
    with pytest.raises(UserError, match=r"\(FBI\); start from a full-precision model$"):
        binarize_(pack_(lm), Sign)


@pytest.mark.parametrize("scheme", [nn.Identity, lambda layer: layer], ids=["another module", "the layer itself"])
def test_what_is_no_scheme_is_refused(scheme):
    lm = small_lm()
    with pytest.raises(UserError, match="no binarization scheme"):
        binarize_(lm, scheme)
    assert not binary_names(lm)


def test_binarizing_a_tied_head_leaves_the_embedding_alone():
    lm = small_lm()
    embedding = lm.backbone.embedding.weight.detach().clone()
    binarize_(lm, Sign, ["lm_head"])
    with torch.no_grad():
        lm.lm_head.latent.zero_()
    assert torch.equal(lm.backbone.embedding.weight, embedding)
    assert lm.head_weight.unique().tolist() == [-1.0]


def test_pack_needs_something_to_pack():
    with pytest.raises(UserError, match="nothing to pack"):
        pack_(small_lm())


def test_packed_model_equals_the_trained_one():
    lm, ids = binarize_(small_lm(), FBI), torch.randint(0, 20, (2, 11))
    expected = lm(ids).logits.detach()
    got = pack_(lm)(ids).logits
    assert (got - expected).norm() / expected.norm() <= 1e-5
    assert sum(isinstance(layer, PackedLinear) for layer in lm.modules()) == 4


class ReadsWeight(nn.Module):
    """A block as transformers and mamba_ssm have them: their fused paths read ``out_proj.weight`` and never call it."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.out_proj.weight, self.out_proj.bias)


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_that_reads_weight_directly_gets_the_binary_weight(packed):
    block, x = binarize_(ReadsWeight(), Sign, ["out_proj"]), torch.randn(3, 8)
    if packed:
        pack_(block)
    signs = torch.where(block.out_proj.weight > 0, 1.0, -1.0)
    torch.testing.assert_close(block(x), x @ signs.T + block.out_proj.bias)
    assert set(block.out_proj.weight.unique().tolist()) <= {-1.0, 1.0}


def test_transformers_mamba2_runs_on_the_binary_weight():
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=8,
        head_dim=8,
        num_heads=4,
        n_groups=1,
        chunk_size=8,
    )
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config)
    ids = torch.randint(0, 20, (1, 9))
    dense = theirs(ids, use_cache=False).logits.detach()
    binarize_(theirs, ScaledSign)
    binary = theirs(ids, use_cache=False).logits
    binary.sum().backward()
    layers = [layer for layer in theirs.modules() if isinstance(layer, BinaryLinear)]
    assert len(layers) == 4 and all(layer.latent.grad.abs().sum() > 0 for layer in layers)
    # The same model with the binary weights written into plain Linear layers.
    for name in [name for name, layer in theirs.named_modules() if isinstance(layer, BinaryLinear)]:
        layer = theirs.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(layer.weight.detach())
        theirs.set_submodule(name, plain)
    torch.testing.assert_close(theirs(ids, use_cache=False).logits, binary)
    assert (binary - dense).abs().max() > 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_a_description_rebuilds_what_is_binary(packed):
    lm = small_lm()
    binarize_(lm, lambda layer: FBI(layer, pattern="row"), ["in_proj"])
    binarize_(lm, ScaledSign, ["out_proj"])
    if packed:
        pack_(lm)
    description = describe_binarization(lm)
    assert [entry["scheme"] for entry in description] == ["FBI", "ScaledSign"]
    fresh = small_lm()
    apply_binarization_(fresh, description)
    assert describe_binarization(fresh) == description
    assert fresh.state_dict().keys() == lm.state_dict().keys()
    fresh.load_state_dict(lm.state_dict())
    ids = torch.randint(0, 20, (1, 7))
    assert torch.equal(fresh(ids).logits, lm(ids).logits)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"scheme": "FBJ"}, "did you mean 'FBI'"),
        ({"scheme": "os.system"}, "must be imported first"),
        ({"options": {"patern": "row"}}, "does not take the options"),
        (
            {"options": {"pattern": "diagonal"}},
            "pattern is 'diagonal', and must be one of column, row, single, two_sided",
        ),
        ({"targets": ["no_such_layer"]}, "matches no Linear layer"),
    ],
)
def test_a_wrong_description_is_refused(entry, message):
    good = {"scheme": "FBI", "options": {"pattern": "row"}, "packed": False, "targets": ["in_proj"]}
    with pytest.raises(UserError, match=message):
        apply_binarization_(small_lm(), [good | entry])


def test_a_description_that_lacks_a_key_is_refused():
    with pytest.raises(UserError, match="must hold scheme, options, targets and packed"):
        apply_binarization_(small_lm(), [{"scheme": "FBI"}])


def test_a_weight_kept_while_decoding_follows_every_change():
    torch.manual_seed(0)
    layer = FBI(nn.Linear(16, 8, bias=False)).eval()
    token = torch.randn(1, 16)

    def changed(change):
        with torch.no_grad():
            layer(token)
            change()
            return torch.equal(layer(token), token @ layer.weight.t())

    assert changed(lambda: layer.latent.neg_())
    assert changed(lambda: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}))
    assert changed(lambda: setattr(layer.latent, "data", -layer.latent.data))
    assert changed(lambda: layer.train().eval())
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    layer(token).sum().backward()
    assert changed(optimizer.step)
    with torch.no_grad():
        kept = layer._kept._formed
        assert layer(token) is not None and layer._kept._formed is kept
    layer.train()
    assert layer._kept._formed is None


@pytest.mark.parametrize("scheme", [FBI, ScaledSign, TwoBit])
def test_a_weight_kept_while_decoding_is_of_the_parameters_that_a_call_is_made_with(scheme):
    layer = scheme(nn.Linear(16, 8, bias=False)).eval()
    token = torch.randn(1, 16)
    with torch.no_grad():
        for seed in range(20):  # each time where the last one lay, as likely as not
            generator = torch.Generator().manual_seed(seed)
            values = {name: torch.rand(p.shape, generator=generator) - 0.3 for name, p in layer.named_parameters()}
            expected = torch.func.functional_call(copy.deepcopy(layer), values, (token.expand(5, -1),))
            torch.testing.assert_close(torch.func.functional_call(layer, values, (token,)), expected[:1])
            del values


@pytest.mark.parametrize("scheme", [FBI, TwoBit])
def test_a_weight_kept_while_decoding_is_neither_copied_nor_pickled(scheme):
    layer = scheme(nn.Linear(64, 64)).eval()
    with torch.no_grad():
        size = len(pickle.dumps(layer))
        layer(torch.randn(1, 64))
        assert layer._kept._formed is not None and len(pickle.dumps(layer)) == size
        assert copy.deepcopy(layer)._kept._formed is None
        packed = pack_(nn.Sequential(layer))
        size = len(pickle.dumps(packed))
        packed(torch.randn(1, 64))
        assert len(pickle.dumps(packed)) == size


# torch.compile's own, where it traces an autograd.Function without gradients.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scheme", [FBI, TwoBit])
def test_a_layer_decodes_where_nothing_tells_whether_its_parameters_changed(scheme):
    token = torch.randn(1, 16)
    with torch.inference_mode():
        layer = scheme(nn.Linear(16, 8)).eval()
        layer(token)
        layer.latent.neg_()
        assert torch.equal(layer(token), nn.functional.linear(token, layer.weight, layer.bias))
    layer = scheme(nn.Linear(16, 8)).eval()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(token), layer(token))
            layer.latent.neg_()
        for model in (layer, pack_(nn.Sequential(copy.deepcopy(layer)))):
            exported = torch.export.export(model, (token,)).module()
            torch.testing.assert_close(exported(token), model(token))


@pytest.mark.parametrize("wrong", ["FBI", None, FBI(nn.Linear(8, 4))])
def test_what_makes_no_layers_is_refused(wrong):
    with pytest.raises(UserError, match="a scheme is a class, as FBI, or what makes a layer of an nn.Linear, not"):
        binarize_(small_lm(), wrong)


def test_a_pattern_that_fbi_does_not_have_is_refused():
    with pytest.raises(UserError, match="pattern is 'diagonal', and must be one of column, row, single, two_sided"):
        FBI(nn.Linear(8, 4), pattern="diagonal")


def test_a_model_that_is_itself_a_layer_is_refused():
    with pytest.raises(UserError, match="itself a Linear layer, which cannot be replaced in place: take scheme"):
        binarize_(nn.Linear(8, 4), FBI, targets="*")
    with pytest.raises(UserError, match="itself a binary layer, which cannot be replaced in place: take packed_form"):
        pack_(FBI(nn.Linear(8, 4)))


def test_a_packed_model_is_not_packed_again():
    lm = pack_(binarize_(small_lm(), FBI))
    with pytest.raises(UserError, match="nothing to pack: .* its binary layers are packed already"):
        pack_(lm)


def test_a_layer_that_a_model_has_twice_stays_one():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(3, 8)
    binarize_(model, FBI, targets="*")
    assert isinstance(model[0], FBI) and model[2] is model[0]
    expected = model(x)
    pack_(model)
    assert isinstance(model[0], PackedLinear) and model[2] is model[0]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("scheme", [partial(FBI, scaled_gradients=True), ScaledSign, Ternary, TwoBit])
def test_gradients_of_every_example_by_torch_func(scheme):
    torch.manual_seed(0)
    layer, x = scheme(nn.Linear(16, 8)), torch.randn(3, 16)

    def loss(parameters, one):
        return torch.func.functional_call(layer, parameters, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    for n, one in enumerate(x):
        layer.zero_grad()
        layer(one).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(each[name][n], parameter.grad, msg=name)
