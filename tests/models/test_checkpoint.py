import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, binarize_, pack_
from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import build, describe, load_lm, load_tokenizer_json

KINDS = ["dense", "untied", "latent", "packed", "mixed", "head"]


def model(kind, make):
    lm = make(tie_embeddings=kind != "untied", ngroups=2)
    if kind in ("latent", "packed"):
        binarize_(lm, lambda linear: FBI(linear, pattern="row"))
    if kind == "mixed":
        binarize_(lm, ScaledSign, targets=["in_proj"])
        pack_(lm)
        binarize_(lm, FBI, targets=["*.1.mixer.out_proj"])
    if kind == "head":
        binarize_(lm, FBI, targets=["lm_head"])
    return pack_(lm) if kind == "packed" else lm


def write_lightning(lm, path, **changes):
    """Write what Lightning does for the modules of this project, with the tied head under both its names."""
    state = {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}
    checkpoint = {
        "epoch": 0,
        "state_dict": state | {"teacher.backbone.embedding.weight": torch.zeros(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(5)}}}],
        "lm": describe(lm),
        "tokenizer": '{"version": "1.0"}',
    }
    torch.save(checkpoint | changes, path)
    return path


def assert_same(loaded, lm):
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(ids).logits, lm(ids).logits)
    mine, theirs = lm.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert describe(loaded) == describe(lm)
    marks = [{name for name, p in m.named_parameters() if hasattr(p, "_no_weight_decay")} for m in (lm, loaded)]
    assert marks[0] == marks[1] != set()
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in lm.named_parameters()], "ties"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folder", "lightning"])
def test_a_saved_model_comes_back(make, tmp_path, kind, form):
    lm, path = model(kind, make), tmp_path / "model"
    lm.save_pretrained(path) if form == "folder" else write_lightning(lm, path)
    before = torch.get_rng_state()
    assert_same(MambaLM.from_pretrained(str(path)), lm)
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"


def test_half_precision_stays_half_precision(make, tmp_path):
    lm = make().bfloat16()
    lm.save_pretrained(tmp_path)
    assert_same(load_lm(tmp_path), lm)


def test_saving_over_the_model_that_was_loaded(make, tmp_path):
    make(seed=0).save_pretrained(tmp_path)
    loaded = load_lm(tmp_path)
    kept = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:  # in place, as no careful program would
        file.seek(weights.stat().st_size // 4)
        file.write(os.urandom(weights.stat().st_size // 2))
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path)
    assert_same(load_lm(tmp_path), loaded)


def test_a_tied_weight_is_stored_once_and_signs_in_bits(make, tmp_path):
    lm = model("packed", make)
    lm.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "backbone.embedding.weight" in stored and "lm_head.weight" not in stored
    assert stored["backbone.layers.0.mixer.out_proj.signs"].shape == (32, 64 // 8)
    assert set(os.listdir(tmp_path)) == {"config.json", "model.safetensors"}


def test_the_description_is_plain_json_and_enough_to_build(make):
    lm = model("mixed", make)
    built = build(json.loads(json.dumps(describe(lm))))
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (lm, built)]
    assert shapes[0] == shapes[1]
    assert built.backbone.embedding.weight.std() > 0.01


def test_the_tokenizer_travels_with_the_model(make, tmp_path):
    lm, text = make(), '{"model": "é"}'
    lm.save_pretrained(tmp_path / "with", tokenizer=text)
    lm.save_pretrained(tmp_path / "without")
    assert load_tokenizer_json(tmp_path / "with") == text
    assert load_tokenizer_json(tmp_path / "without") is None
    assert load_tokenizer_json(write_lightning(lm, tmp_path / "a.ckpt")) == '{"version": "1.0"}'


def refused(path):
    with pytest.raises(UserError) as caught:
        load_lm(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_that_do_not_fit_are_listed_by_name(make, tmp_path):
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    mixer = "backbone.layers.0.mixer."
    del tensors[mixer + "D"], tensors["backbone.norm_f.weight"]
    tensors[mixer + "dt_bais"] = torch.zeros(4)
    tensors[mixer + "A_log"] = torch.zeros(5)
    tensors[mixer + "conv1d.bias"] = tensors[mixer + "conv1d.bias"].int()
    save_file(tensors, weights)
    message = refused(tmp_path)
    assert f"lacks {mixer}D, backbone.norm_f.weight" in message
    assert f"has the unknown {mixer}dt_bais" in message
    assert f"{mixer}A_log (5,) float32 instead of (4,) float32" in message
    assert f"{mixer}conv1d.bias (80,) int32 instead of (80,) float32" in message


def test_a_long_list_of_tensors_is_cut(make, tmp_path):
    lm = make()
    message = refused(write_lightning(lm, tmp_path / "a.ckpt", state_dict={}))
    assert message.endswith(f"and {len(list(lm.parameters())) - 8} more")


def test_nothing_there(make, tmp_path):
    make().save_pretrained(tmp_path / "student")
    assert refused(tmp_path / "studnet").endswith("studnet; did you mean 'student'?")
    assert "there is no file or folder" in refused(tmp_path / "no" / "where")


def test_a_run_folder_points_to_its_checkpoint(make, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_lightning(make(), tmp_path / "checkpoints" / "last.ckpt")
    assert "last.ckpt" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt"])
def test_a_file_cut_short(make, tmp_path, name, share):
    lm = make()
    lm.save_pretrained(tmp_path)
    write_lightning(lm, tmp_path / "last.ckpt")
    file = tmp_path / name
    with file.open("r+b") as open_file:
        open_file.truncate(int(share * file.stat().st_size))
    assert "cut short" in refused(tmp_path if name == "model.safetensors" else file)


def test_a_folder_without_weights(make, tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights: neither model.safetensors nor pytorch_model.bin" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds no mapping of keys to values"),
        ('{"hidden_size": 3}', "a folder of an unknown kind"),
        ('{"model_type": "llama"}', "a transformers folder of the model type 'llama'"),
        ('{"d_model": 768, "n_layer": 2, "attn_layer_idx": [1]}', "attn_layer_idx is [1]"),
        ('{"format": "bimamba-lit", "format_version": 2}', "format version 2"),
        ('{"format": "bimamba-lit", "format_version": 1}', "must hold 'config'"),
    ],
)
def test_configurations_of_another_kind(make, tmp_path, text, words):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheme": "os.system"}, "no binarization scheme 'os.system'"),
        ({"scheme": "FBJ"}, "did you mean 'FBI'?"),
        ({"options": {"patern": "row"}}, "does not take the options"),
        ({"targets": ["backbone.layers.7.mixer.in_proj"]}, "backbone.layers.7.mixer.in_proj"),
    ],
)
def test_a_binarization_that_does_not_fit(make, tmp_path, change, words):
    model("latent", make).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["binarization"][0] |= change
    file.write_text(json.dumps(config))
    assert words in refused(tmp_path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_not_run(make, tmp_path):
    file = write_lightning(make(), tmp_path / "a.ckpt", callbacks=Trap(tmp_path / "trapped"))
    assert "nothing else is opened" in refused(file)
    assert not (tmp_path / "trapped").exists()


def test_a_word_for_what_is_refused_is_only_a_word(make, tmp_path):
    file = write_lightning(lm := make(), tmp_path / "a.ckpt", tokenizer='{"model": {"vocab": {"bytearray": 3}}}')
    assert_same(load_lm(file), lm)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"lm": {}, "state_dict": []}])
def test_a_pytorch_file_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert "of another program" in refused(tmp_path / "a.pt")


def test_files_that_are_no_checkpoints(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert "give the folder it is in" in refused(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("a b c\n" * 100)
    assert "notes.txt" in refused(tmp_path / "notes.txt")


@pytest.mark.parametrize("failure", [SafetensorError("no space left"), OSError(28, "No space left on device")])
def test_a_failed_save_leaves_what_was_there(make, tmp_path, monkeypatch, failure):
    old = make(seed=0)
    old.save_pretrained(tmp_path, tokenizer="old")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(UserError, match=r"cannot write \S*/model.safetensors: [nN]o space left"):
            model("latent", make).save_pretrained(tmp_path, tokenizer="new")
    assert_same(load_lm(tmp_path), old)
    assert load_tokenizer_json(tmp_path) == "old"
    assert set(os.listdir(tmp_path)) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_saving_where_a_file_is(make, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(UserError, match="it is a file, and a folder is needed"):
        make().save_pretrained(tmp_path / "model")
