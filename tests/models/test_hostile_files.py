"""Files that are damaged or made to do harm: one sentence, no code run, no memory taken."""

import collections
import json
import os
import resource
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI, binarize_
from bimamba_lit.errors import UserError
from bimamba_lit.export.convert import FORMS, convert
from bimamba_lit.models.weight_files import write_safetensors

LITTLE = 200 << 20  # bytes


@pytest.fixture
def folders(make, tmp_path):
    """The same small model in every form that is read."""
    binarize_(make(), FBI).save_pretrained(tmp_path / "latent")
    for form in FORMS[1:]:
        convert(tmp_path / "latent", tmp_path / form, form)
    return {form: tmp_path / form for form in FORMS}


def weights(folder):
    return next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def refused(path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as told:
        MambaLM.from_pretrained(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < LITTLE
    assert "\n" not in str(told.value) and len(str(told.value)) < 700
    return str(told.value)


@pytest.mark.parametrize("form", FORMS)
def test_files_cut_short_and_bits_flipped(folders, form):
    file = weights(folders[form])
    whole = file.read_bytes()
    for length in (0, 7, len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(folders[form])
    for place in range(0, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        try:
            lm = MambaLM.from_pretrained(folders[form])
        except UserError:
            continue
        file.write_bytes(whole)  # between the records of a zip file nothing is stored
        assert_same(lm, MambaLM.from_pretrained(folders[form]))


def assert_same(lm, other):
    mine, theirs = lm.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("form", ["latent", "packed", "transformers"])
@pytest.mark.parametrize("damage", [b"crc33", b"crc", b"crc32crc32"])
def test_checksums_under_a_damaged_name(folders, form, damage):
    file = weights(folders[form])
    whole = file.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].replace(b'"crc32"', b'"' + damage + b'"')
    data = bytearray(whole[8 + int.from_bytes(whole[:8], "little") :])
    data[-1] ^= 1
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "its list of checksums is broken" in refused(folders[form])


@pytest.mark.parametrize("length", [2**62, 10**8 + 1, 3])
def test_a_safetensors_header_of_a_wrong_length(folders, length):
    file = weights(folders["packed"])
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert "is damaged or cut short" in refused(folders["packed"])


def test_a_safetensors_header_that_claims_terabytes(folders):
    file = weights(folders["packed"])
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header["backbone.norm_f.weight"] |= {"shape": [1 << 40], "data_offsets": [0, 1 << 41]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "is damaged or cut short" in refused(folders["packed"])


def test_a_choice_of_more_or_fewer_inputs_than_there_are_second_signs(make, tmp_path):
    binarize_(make(), FBI, double_inputs={"out_proj": 0.3}).save_pretrained(tmp_path / "latent")
    convert(tmp_path / "latent", tmp_path / "packed", "packed")
    for folder in (tmp_path / "latent", tmp_path / "packed"):
        file = weights(folder)
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("out_proj.bitmap"))
        for byte in (0, 255):
            write_safetensors(tensors | {name: torch.full_like(tensors[name], byte)}, file)
            assert f"{name} chooses {64 if byte else 0} inputs" in refused(folder)
        write_safetensors(tensors | {name: torch.arange(8)}, file)
        assert f"{name} (8,) int64 instead of" in refused(folder)


CONFIGS = [
    ("latent", ["config"], {"n_layer": 10**9}, "n_layer is 1000000000"),
    ("latent", ["config"], {"d_model": 10**15}, "no model has the sizes"),
    ("latent", ["config"], {"d_model": 10**30}, "no model has the sizes"),
    ("latent", ["config"], {"vocab_size": 10**13}, "in the wrong shape"),
    ("latent", ["config"], {"mixer": "mamba3"}, 'mixer must be "mamba2" or "mamba"'),
    ("packed", [], {"tables": {"bits": 2**70}}, "8 or 4 bits an entry"),
    ("packed", [], {"tables": [8]}, "'tables' must be a mapping"),
    ("packed", ["binarization", 0], {"targets": "*"}, "must be a list of layers' names"),
    ("packed", ["binarization", 0], {"targets": ["*"]}, "the model has no binary layer '*'"),
    ("packed", ["binarization", 0], {"options": {"straight_through": "crooked"}}, "must be one of identity"),
    ("transformers", [], {"num_hidden_layers": 10**9}, "n_layer is 1000000000"),
    ("transformers", [], {"model_type": "mamba3"}, "of the model type 'mamba3'"),
    ("transformers", [], {"model_type": ["mamba"]}, "of the model type ['mamba']"),
    ("transformers", [], {"vocab_size": 62}, "backbone.embedding.weight (61, 32) float16 instead of (62, 32)"),
    ("state-spaces", [], {"n_layer": 10**9}, "n_layer is 1000000000"),
    ("state-spaces", [], {"vocab_size": 10**6}, "backbone.embedding.weight (64, 32) float32 instead of (1000000, 32)"),
    ("bi-mamba", [], {"ssm_cfg": {"layer": "Mamba2", "dt_limit": 3}}, "dt_limit is 3"),
]


@pytest.mark.parametrize(("form", "at", "change", "words"), CONFIGS)
def test_a_configuration_that_asks_for_what_is_not_there(folders, form, at, change, words):
    file = folders[form] / "config.json"
    config = inner = json.loads(file.read_text())
    for key in at:
        inner = inner[key]
    inner |= change
    file.write_text(json.dumps(config))
    assert words in refused(folders[form])


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": ' * 100_000, "\ud800"])
def test_json_that_is_no_configuration(folders, text):
    file = folders["packed"] / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refused(folders["packed"])
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert "1048576 MiB long, and no configuration is" in refused(folders["packed"])


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["state-spaces", "bi-mamba"])
def test_a_pickle_that_would_run_code(folders, tmp_path, form):
    file = weights(folders[form])
    state = torch.load(file, weights_only=True)
    for harm in (Call(os.mkdir, str(tmp_path / "trapped")), Call(eval, "1"), Call(bytearray, 1 << 36)):
        torch.save(state | {"backbone.norm_f.weight": harm}, file)
        assert "nothing else is opened" in refused(folders[form])
    assert not (tmp_path / "trapped").exists()


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_archives_that_unpack_to_more_than_they_are(folders):
    file = weights(folders["state-spaces"])
    rewritten(file, lambda name, content: content + b"\0" * (1 << 18), zipfile.ZIP_DEFLATED)
    assert "is compressed or damaged" in refused(folders["state-spaces"])


def test_a_storage_that_claims_more_than_its_record(folders):
    file = weights(folders["state-spaces"])
    rewritten(file, lambda name, content: content[:4] if "/data/" in name else content)
    assert "damaged" in refused(folders["state-spaces"])


def test_a_tensor_that_repeats_one_value_a_trillion_times(folders):
    file = weights(folders["state-spaces"])
    state = torch.load(file, weights_only=True)
    many = torch.zeros(1).expand(1 << 40)
    both = {"backbone.embedding.weight": many, "lm_head.weight": many}
    torch.save(state | both, file)
    assert "backbone.embedding.weight (1099511627776,) float32 instead of (64, 32)" in refused(folders["state-spaces"])


def test_a_number_type_that_nothing_computes_in(folders):
    file = weights(folders["state-spaces"])
    state = torch.load(file, weights_only=True)
    torch.save(state | {"backbone.norm_f.weight": torch.zeros(32).to(torch.float8_e5m2)}, file)
    assert "backbone.norm_f.weight (32,) float8_e5m2 instead of (32,) float32" in refused(folders["state-spaces"])
    torch.save(state | {"backbone.norm_f.weight": collections.OrderedDict()}, file)
    assert "backbone.norm_f.weight, which is not a tensor with values" in refused(folders["state-spaces"])


def test_the_old_output_stays_when_the_new_one_cannot_be_made(folders, bimamba):
    target = folders["packed"]
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    weights(folders["latent"]).write_bytes(b"damaged")
    answer = bimamba("convert", "--from", folders["latent"], "--to", target, "--format=packed")
    assert answer.code == 1 and answer.err.count("\n") == 0 and "damaged or cut short" in answer.err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
