"""Calibrating whole models: what every layer is fitted to, in models of several kinds, and what goes wrong."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, PTBLinear, ptb
from bimamba_lit.errors import UserError


class Coarse(ptb.PTBScheme):
    """Rounds coarsely, and remembers what it was given."""

    def __init__(self) -> None:
        self.seen = []

    def fit(self, weight, hessian=None):
        self.seen.append((weight.detach().clone(), hessian.clone()))
        return super().fit(weight, hessian)

    def encode(self, weight, data):
        step = weight.abs().max() / 3
        return {"codes": (weight / step).round().to(torch.int8), "steps": step.reshape(1)}

    def decode(self, parts, out_features, in_features):
        return parts["codes"].float() * parts["steps"]


def round_(layer):
    step = layer.weight.data.abs().max() / 3
    layer.weight.data = (layer.weight.data / step).round() * step


def ours():
    return MambaLM(MambaConfig(vocab_size=40, d_model=16, n_layer=3, headdim=8, d_state=8, chunk_size=8))


def ours_mamba1():
    return MambaLM(MambaConfig(vocab_size=40, d_model=16, n_layer=2, mixer="mamba", d_state=4))


def transformers_mamba2():
    transformers = pytest.importorskip("transformers")
    sizes = {"state_size": 8, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8}
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(vocab_size=40, hidden_size=16, num_hidden_layers=2, **sizes)
    )


def transformers_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, **sizes)
    )


class BesideBlock(nn.Module):
    """A block as mamba_ssm has it: the residual stream runs beside it, and one weight is read and not called."""

    def __init__(self):
        super().__init__()
        self.norm, self.in_proj, self.out_proj = nn.LayerNorm(16), nn.Linear(16, 24, False), nn.Linear(24, 16)

    def forward(self, hidden, residual=None, scale=1.0):
        residual = hidden if residual is None else hidden + residual
        wide = (self.in_proj.weight @ self.norm(residual).flatten(0, 1).mT).mT
        hidden = F.linear(torch.relu(wide) * scale, self.out_proj.weight, self.out_proj.bias)
        return hidden.view_as(residual), residual


class Beside(nn.Module):
    """Blocks whose residual stream runs beside them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.layers = nn.ModuleList(BesideBlock() for _ in range(3))

    def forward(self, input_ids):
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, scale=1.5)
        return self.head(hidden + residual)


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


def text(batches=3, length=24):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (2, length), generator=draw) for _ in range(batches)]


def inputs_of(model, name, batches, monkeypatch):
    """All inputs of a layer in whole forward passes, from wherever its weight is multiplied."""
    layer, found = model.get_submodule(name), []
    linear, matmul = F.linear, torch.Tensor.__matmul__

    def watched_linear(x, weight, bias=None):
        if weight is layer.weight:
            found.append(x.detach().flatten(0, -2))
        return linear(x, weight, bias)

    def watched_matmul(a, b):
        if a is layer.weight:
            found.append(b.detach().mT)
        return matmul(a, b)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched_linear)
        patch.setattr(torch.Tensor, "__matmul__", watched_matmul)
        for batch in batches:
            model(batch)
    return torch.cat(found).double()


KINDS = [ours, ours_mamba1, transformers_mamba2, transformers_llama, Beside]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_layer_is_fitted_to_what_the_whole_model_feeds_it(kind, monkeypatch):
    targets = LLAMA if kind is transformers_llama else ["in_proj", "out_proj"]
    scheme, plain = Coarse(), made(kind)
    fitted = ptb.calibrate_(made(kind), scheme, text(), targets=targets)
    names = [name for name, layer in plain.named_modules() if name.rpartition(".")[2] in targets]
    assert len(scheme.seen) == len(names) > 3
    # The same in whole forward passes: a layer's inputs are those that all layers fitted before it give.
    for name, (weight, hessian) in zip(names, scheme.seen, strict=True):
        layer = plain.get_submodule(name)
        assert torch.equal(weight, layer.weight)
        x = inputs_of(plain, name, text(), monkeypatch)
        expected = 2 / len(x) * x.T @ x
        assert (hessian - expected).norm() <= 1e-5 * expected.norm(), name
        round_(layer)
    with torch.no_grad():
        one, other = (model(text()[0]) for model in (plain, fitted))
    torch.testing.assert_close(*(getattr(out, "logits", out) for out in (one, other)))


def test_the_released_mistake_is_not_made(monkeypatch):
    """Passing on a block's first output alone drops the residual stream beside it."""
    scheme = Coarse()
    ptb.calibrate_(made(Beside), scheme, text())
    plain = made(Beside)
    for name in ("in_proj", "out_proj"):
        round_(plain.layers[0].get_submodule(name))
    with torch.no_grad():
        first = plain.layers[0](plain.embedding(torch.cat(text())), scale=1.5)
        x = {"true": first[0] + first[1], "mistaken": first[0]}
    normed = {name: plain.layers[1].norm(stream).flatten(0, 1).double() for name, stream in x.items()}
    true, mistaken = (2 / len(rows) * rows.T @ rows for rows in normed.values())
    _, hessian = scheme.seen[2]
    assert (hessian - true).norm() < 1e-5 * true.norm()
    assert (hessian - mistaken).norm() > 0.1 * true.norm()


def test_hooks_on_blocks_run_once_a_pass_and_see_the_real_stream():
    lm, seen = made(ours), []
    for block in lm.backbone.layers:
        block.register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    ptb.calibrate_(lm, Coarse(), text(1))
    # A pass that ends at a layer has no output; those of the first two blocks reach the next one.
    assert len(seen) == 2 and seen[1][0] is seen[0][1]
    lm(text()[0])
    assert len(seen) == 5 and not any("forward" in vars(block) for block in lm.backbone.layers)


def test_the_same_text_gives_the_same_result_and_modes_are_kept():
    first, second = (ptb.calibrate_(made(ours).train(), ptb.GPTQ(bits=2, group_size=8), text()) for _ in range(2))
    ours_, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours_[name], theirs[name]) for name in ours_)
    assert all(module.training for module in first.modules())
    third = ptb.calibrate_(made(ours), ptb.GPTQ(bits=2, group_size=8), text(2))
    assert any(not torch.equal(value, ours_[name]) for name, value in third.state_dict().items())


def test_mappings_and_documents_reach_the_model():
    ids = text(1)[0]
    documents = torch.arange(24).ge(10).int().expand(2, -1)
    whole, apart = Coarse(), Coarse()
    ptb.calibrate_(made(ours), whole, [{"input_ids": ids, "labels": ids, "unknown": ids}])
    ptb.calibrate_(made(ours), apart, [{"input_ids": ids, "seq_idx": documents}])
    assert torch.equal(whole.seen[0][1], apart.seen[0][1]) and not torch.equal(whole.seen[1][1], apart.seen[1][1])


def test_autocast_and_half_precision_leave_the_hessian_in_fp32():
    plain, cast, half = Coarse(), Coarse(), Coarse()
    ptb.calibrate_(made(ours), plain, text())
    with torch.autocast("cpu", torch.bfloat16):
        ptb.calibrate_(made(ours), cast, text())
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(plain.seen, cast.seen, strict=True))
    lm = ptb.calibrate_(made(ours).to(torch.bfloat16), half, text())
    assert half.seen[0][1].dtype == torch.float32
    assert lm.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert lm(text()[0]).logits.isfinite().all()


def test_only_one_set_of_activations_is_held():
    lm, living, most = made(ours), set(), []

    def watch(block, args, output):
        living.add(id(output))
        weakref.finalize(output, living.discard, id(output))
        most.append(len(living))

    for block in lm.backbone.layers:
        block.register_forward_hook(watch)
    gc.disable()
    try:
        ptb.calibrate_(lm, Coarse(), text(8))
    finally:
        gc.enable()
    assert len(most) == 2 * 8 and max(most) <= 8 + 1


def test_schemes_that_need_no_hessian_need_no_text():
    lm = ptb.calibrate_(made(ours), ptb.ScaledSign())
    assert sum(isinstance(layer, PTBLinear) for layer in lm.modules()) == 6


def assert_unchanged(model, *args, match, **options):
    """Check that a calibration is refused and leaves the model as it was."""
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    with pytest.raises(UserError, match=match):
        ptb.calibrate_(model, *args, **options)
    assert modules == list(model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return model


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": "layer"}, "'layer' is no list of blocks in the model; did you mean 'layers'"),
        ({"targets": ["in_porj"]}, "did you mean 'in_proj'"),
        ({"targets": ["lm_head"]}, "match no layer inside the blocks"),
        ({"batches": []}, "no calibration text: Coarse needs at least one batch"),
    ],
)
def test_wrong_arguments_are_told(options, match):
    assert_unchanged(made(ours), Coarse(), **({"batches": text()} | options), match=match)


def test_two_lists_of_blocks_have_to_be_told_apart():
    both = nn.ModuleDict({"one": made(ours), "two": made(ours)})
    assert_unchanged(both, ptb.Sign(), match="several lists.*one.backbone.layers, two.backbone.layers")
    ptb.calibrate_(both, ptb.Sign(), blocks="two.*layers")
    assert not any(isinstance(layer, PTBLinear) for layer in both["one"].modules())


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_half_done():
    lm = made(ours)
    lm.backbone.layers[1].mixer.out_proj.weight.data[0, 0] = float("nan")
    lm = unchanged_with_nan(lm)
    assert lm.training is False


def unchanged_with_nan(lm):
    modules = list(lm.modules())
    with pytest.raises(UserError, match="layers.1.mixer.out_proj: the weight holds 1 values that are NaN"):
        ptb.calibrate_(lm, ptb.GPTQ(bits=2, group_size=8), text())
    assert modules == list(lm.modules())
    return lm


def test_inputs_that_are_all_zero_are_refused():
    lm = made(ours)
    lm.backbone.layers[2].norm.weight.data.zero_()
    assert_unchanged(
        lm, Coarse(), text(), match="layers.2.mixer.in_proj: its input is zero for all of the calibration text"
    )


def test_inputs_that_are_not_finite_are_refused():
    lm = made(ours)
    lm.backbone.layers[1].norm.weight.data[3] = float("inf")
    with pytest.raises(UserError, match="layers.1.mixer.in_proj: the Hessian holds NaN or infinity"):
        ptb.calibrate_(lm, Coarse(), text())


def test_too_few_tokens_for_the_rank_are_told_and_the_fit_goes_on():
    with pytest.warns(UserWarning, match="in_proj: 6 calibration tokens are too few for the Hessian of 16 inputs"):
        lm = ptb.calibrate_(made(ours), ptb.GPTQ(bits=4, group_size=8), [text(1, 3)[0]])
    assert lm(text()[0]).logits.isfinite().all()


class Fused(torch.autograd.Function):
    """A kernel that takes a weight and multiplies by it where nobody sees."""

    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


class FusedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return x + Fused.apply(x, self.out_proj.weight)


def test_a_product_that_cannot_be_seen_is_told():
    model = made(Beside)
    model.layers = nn.ModuleList([FusedBlock()])
    model.forward = lambda ids: model.layers[0](model.embedding(ids))
    assert_unchanged(
        model, Coarse(), text(), targets=["out_proj"], match="layers.0.out_proj is never multiplied by.*fused"
    )


def test_blocks_that_do_not_run_in_order_are_told():
    model = made(Beside)
    model.forward = lambda ids: [block(model.embedding(ids)) for block in reversed(model.layers)]
    assert_unchanged(model, Coarse(), text(), match="does not run its blocks one after the other")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_the_block_and_the_time_left(capsys, monkeypatch, terminal):
    monkeypatch.setattr("bimamba_lit.binarize.ptb.progress._EVERY_SECONDS", 0.0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    ptb.calibrate_(made(ours), Coarse(), text(), progress=True)
    told = capsys.readouterr().out
    assert "backbone.layers.2 (3 of 3)" in told and "left" in told
    ptb.calibrate_(made(ours), Coarse(), text())
    assert not capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_block_at_a_time_runs_on_the_device_that_is_given():
    home, away = made(ours), made(ours)
    here, there = Coarse(), Coarse()
    ptb.calibrate_(home, here, text())
    ptb.calibrate_(away, there, text(), device="cuda")
    assert {value.device.type for value in away.state_dict().values()} == {"cpu"}
    for (_, one), (_, other) in zip(here.seen, there.seen, strict=True):
        assert other.device.type == "cuda" and (one - other.cpu()).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize("wrong", [FBI, ptb.GPTQ, None])
def test_what_is_no_post_training_scheme_is_refused(wrong):
    with pytest.raises(UserError, match=r"calibrate_ takes a post-training scheme, as ptb.GPTQ\(\), not"):
        ptb.calibrate_(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])}), wrong, targets="*")
