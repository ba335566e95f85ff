"""torch.export: both programs equal their source at other batches and lengths, where this package is not."""

import subprocess
import sys

import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_, pack_
from bimamba_lit.errors import UserError
from bimamba_lit.export.pt2 import export_pt2
from bimamba_lit.models.checkpoint import load_lm

BARE = """
import json, sys
sys.modules["bimamba_lit"] = None  # importing it fails
import torch
files = {"model.json": "", "tokenizer.json": ""}
read = torch.export.load(sys.argv[1], extra_files=files).module()
step = torch.export.load(sys.argv[2]).module()
shapes = json.loads(files["model.json"])["state"]
assert json.loads(files["tokenizer.json"]) == {"type": "bytes"}
answers = []
for ids in torch.load(sys.argv[3], weights_only=True):
    state = [torch.zeros(len(ids), *shape) for shape in shapes]
    logits, state = read(ids[:, :-1], state)
    last, state = step(ids[:, -1], state)
    answers.append(torch.cat([logits, last[:, None]], 1))
torch.save(answers, sys.argv[4])
"""


def small(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "headdim": 16, "mixer": ["mamba", "mamba2"]}
    kept, doubled = {"*.1.mixer.in_proj": ["B", "C", "dt"]}, {"out_proj": 0.3}
    lm = binarize_(MambaLM(MambaConfig(**(sizes | options))), FBI, keep_rows=kept, double_inputs=doubled)
    return lm.eval().requires_grad_(False)


def test_a_process_without_this_package(tmp_path):
    lm = small()
    export_pt2(lm, tmp_path / "model.pt2", '{"type": "bytes"}')
    texts = [torch.randint(61, shape) for shape in ((1, 2), (1, 65), (2, 64), (4, 200))]
    torch.save(texts, tmp_path / "ids.pt")
    arguments = [tmp_path / name for name in ("model.pt2", "model.step.pt2", "ids.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-I", "-c", BARE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in arguments[:2]:
        program = torch.export.load(file)
        held = [*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, torch.Tensor))]
        whole = sum(value.numel() for value in held if value.dtype == torch.int64)
        assert whole < 8, "the choice of inputs lies in bits"
    source = pack_(lm)
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    for ids, logits in zip(texts, torch.load(tmp_path / "logits.pt", weights_only=True), strict=True):
        expected = source(ids).logits
        assert (logits - expected).norm() < 2e-6 * expected.norm(), ids.shape


def test_what_cannot_be_written(tmp_path):
    lm, out = small(mixer="mamba2"), tmp_path / "model.pt2"
    with pytest.raises(UserError, match="is a folder, and pt2 is one file"):
        export_pt2(lm, tmp_path, None)
    with pytest.raises(UserError, match="or as int8 here, not as 'int3'"):
        export_pt2(lm, out, None, embedding="int3")
    (tmp_path / "model.step.pt2").mkdir()
    with pytest.raises(UserError, match="model.step.pt2 is a folder"):
        export_pt2(lm, out, None)
    assert not out.exists()


def test_an_export_that_is_given_as_a_checkpoint_is_told_as_one(tmp_path):
    export_pt2(small(), tmp_path / "student.pt2", None)
    with pytest.raises(UserError, match=r"student\.pt2 is an export, .* not read back; give a folder of this project"):
        load_lm(tmp_path / "student.pt2")
