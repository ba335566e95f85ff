"""Models that transformers saved: logits and every gradient of theirs, shards, and what cannot be read."""

import json

import pytest
import torch

from bimamba_lit import MambaLM
from bimamba_lit.errors import UserError

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 8, "initializer_range": 0.1}
KINDS = {
    "mamba": lambda **more: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, **more)),
    "mamba2": lambda **more: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, head_dim=16, num_heads=4, n_groups=2, chunk_size=16, **more)
    ),
}


def saved(kind, folder, max_shard_size="1GB", **more):
    torch.manual_seed(0)
    model = KINDS[kind](**more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.train()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder of each kind in several files."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        saved(kind, folder, "10KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return made


@pytest.mark.parametrize("shards", ["10KB", "1GB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_every_gradient(kind, tied, shards, tmp_path, error):
    theirs = saved(kind, tmp_path, shards, tie_word_embeddings=tied)
    ours = MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(50, (2, 41))
    weight = torch.randn(2, 41, 50)
    for model in (ours, theirs):
        (model(ids).logits * weight).sum().backward()
    assert error(ours(ids).logits, theirs(ids).logits) < 1e-5
    right = {name.replace("embeddings", "embedding"): p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == right.keys()
    for name, gradient in found.items():
        assert error(gradient, right[name]) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_model_decodes_saves_and_keeps_its_dtype(kind, tmp_path, error):
    theirs = saved(kind, tmp_path / "theirs")
    lm = MambaLM.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(50, (2, 12))
    state, stepped = lm.init_state(2), []
    for token in ids.unbind(1):
        logits, state = lm.step(token, state)
        stepped.append(logits)
    assert error(torch.stack(stepped, 1), lm(ids).logits) < 1e-5
    lm.save_pretrained(tmp_path / "ours")
    assert torch.equal(MambaLM.from_pretrained(tmp_path / "ours")(ids).logits, lm(ids).logits)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = MambaLM.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def refused(folder):
    with pytest.raises(UserError) as told:
        MambaLM.from_pretrained(folder)
    assert "\n" not in str(told.value)
    return str(told.value)


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("change_to", "words"),
    [
        ({"use_bias": True}, "use_bias is True, and models of this project have it as False only"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"time_step_limit": [0.0, 5.0]}, "time_step_limit is [0.0, 5.0]"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"num_heads": 5}, "num_heads is 5, and the other sizes make it 4"),
        ({"state_size": "eight"}, "d_state must be a positive integer"),
        ({"n_groups": 1}, "in the wrong shape"),
        ({"num_hidden_layers": 3}, "lacks backbone.layers.2."),
        ({"num_hidden_layers": 1}, "has the unknown backbone.layers.1."),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path, change_to, words):
    saved("mamba2", tmp_path)
    change(tmp_path, **change_to)
    assert words in refused(tmp_path)


def test_files_that_are_missing_damaged_or_elsewhere(folders, tmp_path):
    for file in folders["mamba2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index, shards = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("model-*"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-20])
    assert f"{shards[1].name} is damaged or cut short" in refused(tmp_path)
    shards[1].unlink()
    assert f"lacks the shard {shards[1].name}, one of {len(shards)}" in refused(tmp_path)
    text = index.read_text()
    index.write_text(text.replace(shards[1].name, "../other.safetensors"))
    assert "in '../other.safetensors', which is not the name of a file beside it" in refused(tmp_path)
    index.write_text(text[:40])
    assert "is not readable JSON of an index of shards" in refused(tmp_path)
    index.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is no checkpoint, or is damaged or cut short" in refused(tmp_path)
