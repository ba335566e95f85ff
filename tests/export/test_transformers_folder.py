"""Folders for transformers: its own classes load them without code of ours and compute the same."""

import json

import pytest
import torch

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, binarize_, pack_
from bimamba_lit.data.tokenizer import ByteTokenizer
from bimamba_lit.export.safetensors import export_safetensors
from bimamba_lit.export.transformers_folder import export_transformers

transformers = pytest.importorskip("transformers")
IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


def theirs(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("mixer", "tied"), [("mamba", True), ("mamba2", True), ("mamba2", False)])
def test_the_same_logits(make, error, tmp_path, mixer, tied, dtype):
    lm = binarize_(make(mixer=mixer, tie_embeddings=tied, ngroups=1 if mixer == "mamba" else 2), FBI)
    export_transformers(lm, tmp_path, None, dtype=dtype)
    model = theirs(tmp_path)
    assert type(model).__name__ == {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[mixer]
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    found = model.float()(IDS).logits
    assert found.shape == (2, 21, 61)
    assert error(found, MambaLM.from_pretrained(tmp_path).float()(IDS).logits) < 1e-5
    if dtype == "float32":
        assert error(found, lm(IDS).logits) < 1e-5


@pytest.mark.parametrize("form", ["packed", "int8"])
def test_from_a_packed_model(make, error, tmp_path, form):
    lm = pack_(binarize_(make(), ScaledSign))
    if form == "int8":
        export_safetensors(lm, tmp_path / "int8", None, embedding="int8")
        lm = MambaLM.from_pretrained(tmp_path / "int8")
    export_transformers(lm, tmp_path / "out", None, dtype="float32")
    assert error(theirs(tmp_path / "out")(IDS).logits, lm(IDS).logits) < 1e-5


def test_bytes_as_their_tokenizer(make, tmp_path):
    export_transformers(make(vocab_size=257), tmp_path, ByteTokenizer().to_json())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Héllo,  you\n\t中 \x00 12"
    ids = tokenizer(text)["input_ids"]
    assert ids == ByteTokenizer().encode(text) and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == ByteTokenizer.separator
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == 256


def test_without_a_tokenizer_no_token_is_special(make, tmp_path):
    export_transformers(make(), tmp_path, None)
    config = theirs(tmp_path).config
    assert config.eos_token_id is config.pad_token_id is config.bos_token_id is None
    assert not (tmp_path / "tokenizer.json").exists()


def test_their_generation_is_ours(make, tmp_path):
    lm = binarize_(make(), FBI).eval()
    export_transformers(lm, tmp_path, None, dtype="float32")
    found = theirs(tmp_path).generate(IDS[:1], max_new_tokens=6, do_sample=False)
    ids = IDS[:1]
    for _ in range(6):
        ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)
