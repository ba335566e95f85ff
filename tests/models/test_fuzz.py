"""Random damage to every file a model is read from: a model comes out, or one sentence, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, binarize_, pack_
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import FORMS, convert
from bimamba_lit.export.safetensors import export_safetensors
from bimamba_lit.models.checkpoint import describe

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
KINDS = [*FORMS, "int4", "lightning", "shards"]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["mamba", "mamba2", "Mamba1", "FBI", "ScaledSign", "row", "in_proj", "*", "float32", 10**15]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small model in every form that is read: the path to read, and the files there."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layer": 1, "vocab_size": 11, "d_state": 4, "headdim": 8, "chunk_size": 8}
    lm = MambaLM(MambaConfig.from_dict(sizes))
    binarize_(lm, FBI, ["in_proj"])
    binarize_(lm, ScaledSign, ["out_proj"])
    lm.save_pretrained(folder / "latent", tokenizer='{"type": "bytes"}')
    for form in FORMS[1:]:
        convert(folder / "latent", folder / form, form)
    export_safetensors(lm, folder / "int4", None, embedding="int4", group_size=8)
    (folder / "lightning").mkdir()
    state = {f"lm.{name}": tensor for name, tensor in pack_(lm).state_dict().items()}
    torch.save({"lm": describe(lm), "state_dict": state, "tokenizer": "{}"}, folder / "lightning" / "last.ckpt")
    shutil.copytree(folder / "state-spaces", folder / "shards")
    (folder / "shards" / "pytorch_model.bin").rename(folder / "shards" / "part.bin")
    names = torch.load(folder / "shards" / "part.bin", weights_only=True)
    index = {"weight_map": dict.fromkeys(names, "part.bin")}
    (folder / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for kind in KINDS:
        MambaLM.from_pretrained(readable(folder / kind))
    return folder


def readable(folder: Path) -> Path:
    return folder / "last.ckpt" if (folder / "last.ckpt").exists() else folder


def reads_or_tells(folder: Path):
    try:
        lm = MambaLM.from_pretrained(readable(folder))
    except UserError as told:
        assert "\n" not in str(told) and len(str(told)) < 4000
        return None
    assert isinstance(lm, MambaLM)
    return lm


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Flip, cut, insert and repeat bytes."""
    out = bytearray(content)
    # The structure of these files is at their ends; a place anywhere would mostly be one of a tensor.
    ends = st.integers(0, min(300, len(out) - 1)).flatmap(lambda i: st.sampled_from([i, -1 - i]))
    places = st.one_of(ends, st.integers(0, len(out) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(places) % max(1, len(out))
        match data.draw(st.sampled_from(["flip", "byte", "cut", "insert", "number"])):
            case "flip" if out:
                out[place] ^= 1 << data.draw(st.integers(0, 7))
            case "byte" if out:
                out[place] = data.draw(st.integers(0, 255))
            case "cut":
                del out[place : place + data.draw(st.sampled_from([1, 4, len(out)]))]
            case "insert":
                out[place:place] = data.draw(st.binary(max_size=9))
            case "number":
                out[place : place + 8] = data.draw(st.sampled_from([2**63 - 1, 2**40, 2**32 - 1])).to_bytes(8, "little")
    return bytes(out)


def changed(data: st.DataObject, config: object) -> object:
    """Replace, drop or add a value somewhere in a configuration."""
    if isinstance(config, dict) and config and data.draw(st.booleans() | st.just(True)):
        key = data.draw(st.sampled_from(sorted(config)))
        match data.draw(st.sampled_from(["inside", "drop", "add", "replace"])):
            case "inside":
                return config | {key: changed(data, config[key])}
            case "drop":
                return {k: v for k, v in config.items() if k != key}
            case "add":
                return config | {data.draw(st.text(max_size=8)): data.draw(values)}
            case _:
                return config | {key: data.draw(values)}
    if isinstance(config, list) and config:
        place = data.draw(st.integers(0, len(config) - 1))
        return [*config[:place], changed(data, config[place]), *config[place + 1 :]]
    return data.draw(values)


def a_damaged_file(sound, data):
    kind = data.draw(st.sampled_from(KINDS))
    folder = sound / kind
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = file.read_bytes()
    original = MambaLM.from_pretrained(readable(folder)) if file.suffix == ".safetensors" else None
    file.write_bytes(damaged(data, whole))
    try:
        lm = reads_or_tells(folder)
        if lm is not None and original is not None:  # these have checksums, so a model that comes out is the model
            assert all(torch.equal(t, original.state_dict()[name]) for name, t in lm.state_dict().items())
    finally:
        file.write_bytes(whole)


def a_changed_configuration(sound, data):
    kind = data.draw(st.sampled_from([kind for kind in KINDS if kind != "lightning"]))
    file = sound / kind / data.draw(st.sampled_from(["config.json", "config.json", "pytorch_model.bin.index.json"]))
    if not file.exists():
        file = sound / kind / "config.json"
    whole = file.read_text()
    file.write_text(json.dumps(changed(data, json.loads(whole))))
    try:
        reads_or_tells(sound / kind)
    finally:
        file.write_text(whole)


def a_changed_checkpoint(sound, data):
    file = sound / "lightning" / "last.ckpt"
    whole = file.read_bytes()
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["lm"] = changed(data, checkpoint["lm"])
    torch.save(checkpoint, file)
    try:
        reads_or_tells(sound / "lightning")
    finally:
        file.write_bytes(whole)


CASES = [a_damaged_file, a_changed_configuration, a_changed_checkpoint]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@settings(**QUIET, max_examples=120, derandomize=True)
@given(data=st.data())
def test_a_model_or_one_sentence(sound, case, data):
    case(sound, data)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@settings(**QUIET, max_examples=4000)
@given(data=st.data())
def test_a_model_or_one_sentence_at_length(sound, case, data):
    case(sound, data)
