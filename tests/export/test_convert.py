"""`bimamba convert`: every form to every other, as a user runs it; and what a form cannot hold."""

import json
from contextlib import nullcontext

import pytest
import torch

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI, BinaryLinear, PackedLinear, ScaledSign, Sign, binarize_, pack_, ptb
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import FORMS, convert
from bimamba_lit.export.gguf import export_gguf

IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


def logits(lm):
    with torch.no_grad():
        return lm(IDS).logits


def binary(make, scheme=FBI, **options):
    lm = make(**options)
    binarize_(lm, scheme)
    for layer in lm.modules():
        if isinstance(layer, FBI):  # a shift of its own, as training gives it
            torch.nn.init.normal_(layer.terms().popitem()[1], std=0.1)
    return lm


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("form", ["latent", "packed", "transformers", "state-spaces", "bi-mamba"])
def test_a_binary_model_in_every_form_and_back(make, error, bimamba, tmp_path, form, mixer):
    lm = binary(make, mixer=mixer)
    lm.save_pretrained(tmp_path / "from", tokenizer='{"type": "bytes"}')
    dtype = [] if form == "latent" else ["--dtype=float32"]
    answer = bimamba("convert", "--from", tmp_path / "from", "--to", tmp_path / "to", "--format", form, *dtype)
    assert answer.code == 0 and answer.out == f"Written: {tmp_path / 'to'}\n", answer
    there = MambaLM.from_pretrained(tmp_path / "to")
    assert error(logits(there), logits(lm)) < 1e-5
    layer, original = there.backbone.layers[0].mixer.in_proj, lm.backbone.layers[0].mixer.in_proj
    kinds = {"latent": BinaryLinear, "packed": PackedLinear, "bi-mamba": BinaryLinear}
    assert isinstance(layer, kinds.get(form, torch.nn.Linear))
    if form != "packed":
        # The dense weight has a shift in it, so its signs are not those of the latent weight.
        assert torch.equal(layer.weight, original.weight)
    else:
        assert torch.equal(layer.signs, original.packed_signs())
    convert(tmp_path / "to", tmp_path / "back")
    assert torch.equal(logits(MambaLM.from_pretrained(tmp_path / "back")), logits(there))


@pytest.mark.parametrize("scheme", [ScaledSign, lambda layer: ScaledSign(layer, centred_rows=True), Sign])
@pytest.mark.parametrize("packed", [True, False])
def test_other_schemes_in_the_bi_mamba_form(make, error, tmp_path, scheme, packed):
    lm = binary(make, scheme, tie_embeddings=False)
    expected = logits(lm)
    if packed:
        pack_(lm)
    lm.save_pretrained(tmp_path / "from")
    convert(tmp_path / "from", tmp_path / "to", "bi-mamba")
    state = torch.load(tmp_path / "to" / "pytorch_model.bin", weights_only=True)
    assert state["backbone.layers.0.mixer.out_proj.wscale"].shape in [(32, 1), (1,)]
    assert error(logits(MambaLM.from_pretrained(tmp_path / "to")), expected) < 1e-5


def calibrated(make, scheme):
    """A model fitted after training, on random tokens."""
    lm = make(d_model=128, headdim=32, n_layer=1).eval()
    batches = [torch.randint(61, (4, 80), generator=torch.Generator().manual_seed(2))]
    return ptb.calibrate_(lm, scheme, batches, blocks="backbone.layers")


@pytest.mark.parametrize("scheme", [ptb.ScaledSign(), ptb.BiLLM()], ids=lambda scheme: type(scheme).__name__)
def test_a_model_fitted_after_training_in_every_form(make, error, tmp_path, scheme):
    lm = calibrated(make, scheme)
    lm.save_pretrained(tmp_path / "latent")
    parts = {name: tensor for name, tensor in lm.state_dict().items() if "_proj." in name}
    for form in FORMS[1:]:
        try:
            convert(tmp_path / "latent", tmp_path / form, form, "float32")
        except UserError as told:
            assert isinstance(scheme, ptb.BiLLM) and form == "bi-mamba"
            assert "in_proj (ptb.BiLLM) holds more than one sign a weight" in str(told)
            continue
        there = MambaLM.from_pretrained(tmp_path / form)
        assert error(logits(there), logits(lm)) < 1e-5
    packed = MambaLM.from_pretrained(tmp_path / "packed").state_dict()
    if isinstance(scheme, ptb.BiLLM):
        assert all(torch.equal(packed[name], part) and packed[name].dtype == part.dtype for name, part in parts.items())
    with pytest.raises(UserError) if isinstance(scheme, ptb.BiLLM) else nullcontext():
        export_gguf(lm, tmp_path / "lm.gguf", None)
    export_gguf(lm, tmp_path / "lm.gguf", None, fallback="f16")


def test_what_forms_cannot_hold(make, tmp_path):
    both = make(mixer=["mamba", "mamba2"])
    both.save_pretrained(tmp_path / "both")
    eps = make(norm_eps=1e-6)
    eps.save_pretrained(tmp_path / "eps")
    for source, form, words in [
        ("both", "transformers", "mixes Mamba-1 and Mamba-2"),
        ("both", "state-spaces", "mixes Mamba-1 and Mamba-2"),
        ("eps", "state-spaces", "norm_eps is 1e-06, and mamba_ssm has 1e-05 only"),
        ("eps", "bi-mamba", "no binary layer"),
        ("eps", "bi-mmba", "did you mean 'bi-mamba'?"),
    ]:
        with pytest.raises(UserError, match=words):
            convert(tmp_path / source, tmp_path / "to", form)
        assert not (tmp_path / "to").exists()


def test_two_scales_do_not_fit_the_bi_mamba_form(make, tmp_path):
    class BothSides(BinaryLinear):
        def terms(self):
            return {"in_scale": torch.ones(self.in_features), "out_scale": torch.ones(self.out_features)}

    binarize_(lm := make(), BothSides)
    lm.save_pretrained(tmp_path / "from")
    with pytest.raises(
        UserError, match=r"in_proj \(BothSides\) has in_scale, out_scale, and the Bi-Mamba form has one"
    ):
        convert(tmp_path / "from", tmp_path / "to", "bi-mamba")


def test_targets_that_are_refused(make, bimamba, tmp_path):
    make().save_pretrained(tmp_path / "from")
    for args, words in [
        (["--to", tmp_path / "from"], "is the model that is to be converted"),
        (["--to", tmp_path / "to", "--dtype=float16"], "keeps every tensor in its own type"),
        (["--to", tmp_path / "to", "--format=packed", "--dtype=flat16"], "did you mean 'float16'?"),
    ]:
        answer = bimamba("convert", "--from", tmp_path / "from", *args)
        assert answer.code == 1 and words in answer.err and "Traceback" not in answer.err
    convert(tmp_path / "from", tmp_path / "to")
    before = {path: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    answer = bimamba("convert", "--from", tmp_path / "from", "--to", tmp_path / "to", "--format=state-spaces")
    assert answer.code == 1 and "holds model.safetensors, weights of another form" in answer.err
    assert {path: path.read_bytes() for path in (tmp_path / "to").iterdir()} == before


def test_a_run_folder_is_not_its_own_target(bimamba, tiny):
    before = sorted(tiny.teacher.rglob("*"))
    answer = bimamba("convert", "--from", tiny.teacher, "--to", tiny.teacher)
    assert answer.code == 1 and f"{tiny.teacher} is the model that is to be converted" in answer.err
    assert sorted(tiny.teacher.rglob("*")) == before


def test_a_value_outside_the_range_of_the_type(make, tmp_path):
    lm = make()
    with torch.no_grad():
        lm.backbone.norm_f.weight[0] = 1e5
    lm.save_pretrained(tmp_path / "from")
    for form in ("packed", "transformers", "state-spaces"):
        with pytest.raises(UserError, match=r"norm_f.weight has values outside the range of float16"):
            convert(tmp_path / "from", tmp_path / "to", form, "float16")
        convert(tmp_path / "from", tmp_path / form, form, "bfloat16")


def test_the_configuration_of_mamba_ssm_is_complete(make, tmp_path):
    make(pad_vocab_size_multiple=16).save_pretrained(tmp_path / "from")
    convert(tmp_path / "from", tmp_path / "to", "state-spaces")
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["vocab_size"] == 61 and config["pad_vocab_size_multiple"] == 16
    assert config["ssm_cfg"] == {
        "layer": "Mamba2",
        "d_state": 8,
        "d_conv": 4,
        "expand": 2,
        "headdim": 16,
        "ngroups": 1,
        "chunk_size": 8,
    }
    state = torch.load(tmp_path / "to" / "pytorch_model.bin", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()
