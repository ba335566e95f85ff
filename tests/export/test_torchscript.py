"""TorchScript: the file equals its source, in every mode, where this package cannot be imported."""

import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import (
    FBI,
    BinaryLinear,
    ScaledSign,
    Sign,
    binarize_,
    binary_layers,
    no_decay,
    pack_,
)
from bimamba_lit.errors import UserError
from bimamba_lit.export.deployed_linear import multiply_integers, to_integers
from bimamba_lit.export.torchscript import export_torchscript
from bimamba_lit.models.checkpoint import load_lm
from bimamba_lit.models.quantized_table import quantize_tables_

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
IDS = torch.randint(61, (2, 83), generator=torch.Generator().manual_seed(1))


class Everything(BinaryLinear):
    """Every term of the formula."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        outputs, inputs = self.latent.shape
        self.column = no_decay(0.5 + torch.rand(inputs))
        self.row = no_decay(torch.randn(outputs))
        self.group = no_decay(0.05 * torch.rand(outputs, 4))
        self.column_shift = no_decay(0.01 * torch.randn(inputs))
        self.row_shift = no_decay(0.01 * torch.randn(outputs))

    def terms(self):
        return {
            "in_scale": self.column,
            "out_scale": self.row,
            "group_scale": self.group,
            "in_shift": self.column_shift,
            "out_shift": self.row_shift,
        }


def small(scheme=FBI, targets=("in_proj", "out_proj"), keep_rows=None, double_inputs=None, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 16, "chunk_size": 8}
    lm = MambaLM(MambaConfig(**(sizes | options)))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    lm = lm if scheme is None else binarize_(lm, scheme, targets, keep_rows or {}, double_inputs or {})
    return lm.eval().requires_grad_(False)


def rounded_(lm, dtype=torch.float16):
    """Round everything but signs, in place; of a model with binary layers, its packed form."""
    lm = pack_(lm) if list(binary_layers(lm)) else lm
    for tensor in lm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return lm


def error(value, expected):
    return float((value - expected).norm() / expected.norm())


def in_pieces(model):
    """Return the logits of IDS by two prefills and steps."""
    state = model.init_state(len(IDS))
    first, state = model.prefill(IDS[:, :66], state)
    second, state = model.prefill(IDS[:, 66:79], state)
    ones = []
    for t in range(79, IDS.shape[1]):
        one, state = model.step(IDS[:, t], state)
        ones.append(one)
    return torch.cat([first, second, torch.stack(ones, 1)], 1)


MODELS = {
    "FBI": small,
    "row, two groups": partial(small, partial(FBI, pattern="row"), ngroups=2),
    "every term, head": partial(small, Everything, ("in_proj", "lm_head"), tie_embeddings=False),
    "every projection of Mamba-1": partial(small, ScaledSign, ("*_proj",), mixer="mamba"),
    "rows in full precision": partial(small, keep_rows={"in_proj": ["x", "dt"], "*.1.mixer.in_proj": ["B"]}),
    "inputs with two signs, head": partial(
        small,
        partial(FBI, pattern="two_sided"),
        ("*_proj", "lm_head"),
        {"*.1.*.in_proj": ["B"]},
        {"*_proj": 0.3, "lm_head": 0.3},
        tie_embeddings=False,
        d_model=64,
    ),
    "both mixers": partial(small, Sign, mixer=["mamba", "mamba2"]),
    "full precision, untied": partial(small, None, tie_embeddings=False),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_file_equals_its_source(make, tmp_path):
    lm = make()
    export_torchscript(lm, tmp_path / "model.pt", None)
    model = torch.jit.load(tmp_path / "model.pt")
    stored = {name: value for name, value in model.named_buffers() if name.endswith("signs")}
    assert len(stored) == len(list(binary_layers(lm)))
    unprepared = torch.jit.load(tmp_path / "model.pt").state_dict().values()
    assert not any(value.dtype == torch.int64 for value in unprepared), "the choice of inputs lies in bits"
    source = rounded_(lm)
    for (name, layer), signs in zip(binary_layers(source), stored.values(), strict=True):
        assert torch.equal(layer.signs, signs), name
    expected = source(IDS).logits
    assert error(model(IDS), expected) < 2e-6 and model.mode == "exact"
    assert error(in_pieces(model), expected) < 2e-6
    model.prepare("small")
    assert error(model(IDS), expected) < 2e-6
    assert error(in_pieces(model), expected) < 2e-6
    model.prepare("fast")
    assert 1e-4 < error(model(IDS), expected) < 0.04  # 8-bit activations, a few layers and the head
    assert error(in_pieces(model), model(IDS)) < 5e-3
    model.prepare("exact")
    assert error(model(IDS), expected) < 2e-6, "a mode can follow any other"


def test_packed_models_export_as_the_latent_ones_do(tmp_path):
    export_torchscript(small(), tmp_path / "latent.pt", None)
    export_torchscript(pack_(small()), tmp_path / "packed.pt", None)
    latent, packed = (torch.jit.load(tmp_path / name) for name in ("latent.pt", "packed.pt"))
    assert torch.equal(latent(IDS), packed(IDS))


@pytest.mark.parametrize("tie", [True, False])
def test_int8_embedding(tie, tmp_path):
    lm = small(None, tie_embeddings=tie, d_model=64)
    export_torchscript(lm, tmp_path / "model.pt", None, dtype="float32", embedding="int8")
    model = torch.jit.load(tmp_path / "model.pt")
    tables = [lm.backbone.embedding.weight] if tie else [lm.backbone.embedding.weight, lm.lm_head.weight]
    for table in tables:  # 8-bit integers with the largest of a row at 127
        scale = table.abs().amax(1, keepdim=True) / 127
        table.copy_((table / scale).round() * scale)
    for mode in ("exact", "small"):
        model.prepare(mode)
        assert error(model(IDS), lm(IDS).logits) < 2e-6, mode
    model.prepare("fast")
    assert error(model(IDS), lm(IDS).logits) < 0.02
    stored = dict(model.named_buffers())["embedding.stored"]
    assert stored.dtype == torch.int8 and stored.abs().amax() == 127


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_with_a_quantized_embedding(tie, tmp_path):
    lm = small(tie_embeddings=tie)
    quantize_tables_(lm, 8)
    export_torchscript(lm, tmp_path / "model.pt", None, embedding="int8")
    model = torch.jit.load(tmp_path / "model.pt")
    assert torch.equal(dict(model.named_buffers())["embedding.stored"], lm.backbone.embedding.table.codes[:61])
    assert error(model(IDS), rounded_(lm)(IDS).logits) < 2e-6


def test_integers_are_exact_where_signs_are():
    signs = torch.where(torch.randn(48, 40) > 0, 1.0, -1.0)
    x = torch.randint(-127, 128, (3, 40)).float()
    x[:, 0] = 127  # so that a token's scale is one
    assert torch.equal(multiply_integers(x, signs.to(torch.int8)), x @ signs.T)


@pytest.mark.parametrize("highest", [127, 63])
def test_integers_round_to_half_a_step(highest):
    weight = torch.randn(5, 40)
    weight[2] = 0.0
    integers, scale = to_integers(weight, highest, torch.float16)
    assert integers.abs().amax() == highest
    assert ((integers * scale[:, None].float() - weight).abs() <= 0.51 * scale[:, None].float()).all()


BARE = """
import json, sys
sys.modules["bimamba_lit"] = None  # importing it fails
import torch
files = {"model.json": "", "tokenizer.json": ""}
model = torch.jit.load(sys.argv[1], _extra_files=files)
ids = torch.load(sys.argv[2], weights_only=True)
torch.manual_seed(3)
drawn = model.generate(ids[:, :5], 9, 1.0)
assert drawn.shape == (2, 14) and torch.equal(drawn[:, :5], ids[:, :5]) and int(drawn.max()) < 61
torch.manual_seed(3)
assert torch.equal(model.generate(ids[:, :5], 9, 1.0), drawn)
assert torch.equal(model.generate(ids, 0, 1.0), ids)
likeliest = model.generate(ids[:, :5], 9, 0.0)
assert torch.equal(model(likeliest[:, :-1])[:, 4:].argmax(-1), likeliest[:, 5:])
for wrong in (
    lambda: model.prepare("quick"), lambda: model(ids + 60), lambda: model(ids[:, :0]), lambda: model(ids[0]),
    lambda: model.step(ids, model.init_state(2)), lambda: model.step(ids[:, 0], model.init_state(3)),
    lambda: model.generate(ids, -1, 1.0),
):
    try:
        wrong()
    except torch.jit.Error as error:
        assert "ValueError" in str(error), error
    else:
        raise SystemExit("accepted")
about = json.loads(files["model.json"])
assert about["config"] == json.loads(model.config) and about["scheme"] == json.loads(model.scheme)
assert about["scheme"][0]["scheme"] == "FBI" and model.vocab_size == 61
assert json.loads(files["tokenizer.json"]) == {"type": "bytes"}
assert not [name for name in sys.modules if name.startswith("bimamba_lit.")]
torch.save(model(ids), sys.argv[3])
"""


def test_a_process_without_this_package(tmp_path):
    lm = small()
    export_torchscript(lm, tmp_path / "model.pt", '{"type": "bytes"}')
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [tmp_path / "model.pt", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    done = subprocess.run([sys.executable, "-I", "-c", BARE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert error(torch.load(tmp_path / "logits.pt", weights_only=True), rounded_(lm)(IDS).logits) < 2e-6


CPP = """
#include <torch/script.h>
#include <iostream>
int main(int, char** argv) {
  torch::NoGradGuard no_grad;
  torch::jit::ExtraFilesMap files{{"model.json", ""}};
  auto model = torch::jit::load(argv[1], torch::kCPU, files);
  model.run_method("prepare", "fast");
  model.run_method("prepare", "exact");
  auto ids = torch::arange(20).reshape({2, 10});
  auto logits = model.forward({ids}).toTensor();
  auto state = model.run_method("init_state", 2);
  state = model.run_method("prefill", ids.slice(1, 0, 9), state).toTuple()->elements()[1];
  auto last = model.run_method("step", ids.select(1, 9), state).toTuple()->elements()[0].toTensor();
  auto more = model.run_method("generate", ids, 4, 0.0).toTensor();
  if ((last - logits.select(1, 9)).abs().max().item<float>() > 1e-4 || more.size(1) != 14) return 1;
  if (files["model.json"].find("\\"scheme\\"") == std::string::npos) return 2;
  for (int i = 0; i < 61; ++i) std::cout << last[1][i].item<float>() << "\\n";
}
"""
CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(deployer CXX)
find_package(Torch REQUIRED)
add_executable(deployer main.cpp)
target_link_libraries(deployer "${TORCH_LIBRARIES}")
set_property(TARGET deployer PROPERTY CXX_STANDARD 20)
"""


@pytest.mark.slow
def test_libtorch(tmp_path):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    lm = small()
    export_torchscript(lm, tmp_path / "model.pt", None)
    (tmp_path / "main.cpp").write_text(CPP)
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    build = tmp_path / "build"
    prefix = torch.utils.cmake_prefix_path
    configure = ["cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(configure, capture_output=True, text=True)
    if torch.version.cuda is not None and "Could NOT find CUDA" in done.stdout:
        pytest.skip("torch's CUDA build is linked with the CUDA toolkit, which is not here")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", build], check=True)
    done = subprocess.run([build / "deployer", tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = rounded_(lm)(torch.arange(20).reshape(2, 10)).logits[1, 9]
    torch.testing.assert_close(torch.tensor([float(x) for x in done.stdout.split()]), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_written(tmp_path):
    lm, out = small(), tmp_path / "model.pt"
    out.write_text("the old one")
    with pytest.raises(UserError, match="is a folder, and torchscript is one file"):
        export_torchscript(lm, tmp_path, None)
    with pytest.raises(UserError, match="not 'float61'; did you mean 'float16'"):
        export_torchscript(lm, out, None, dtype="float61")
    with pytest.raises(UserError, match="or as int8 here, not as 'int3'"):
        export_torchscript(lm, out, None, embedding="int3")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(UserError, match=f"cannot write {out}"):
            export_torchscript(lm, out, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lm.backbone.norm_f.weight[3] = 1e6
    with pytest.raises(UserError, match="not finite in float16; use --dtype bfloat16"):
        export_torchscript(lm, out, None)
    assert out.read_text() == "the old one" and list(tmp_path.iterdir()) == [out]


def test_the_command(tiny, bimamba, tmp_path):
    out = tmp_path / "teacher.pt"
    answer = bimamba("export", "--ckpt", tiny.teacher, "--format", "torchscript", "--out", out, "--embedding", "int8")
    assert answer.code == 0 and answer.out == f"Written: {out}\n" and "deprecated" not in answer.err
    files = {"model.json": "", "tokenizer.json": ""}
    model = torch.jit.load(out, _extra_files=files)
    assert json.loads(files["model.json"])["embedding"] == "int8" and b"bytes" in files["tokenizer.json"]
    assert model.generate(torch.tensor([list(b"The ")]), 3, 0.0).shape == (1, 7)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--format", "torchscrip", "--out", "x"], "there is no format 'torchscrip'; did you mean 'torchscript'?"),
        (["--format", "torchscript", "--out", "."], ". is a folder, and torchscript is one file: give its name too"),
    ],
)
def test_a_wrong_command(tiny, bimamba, args, sentence):
    answer = bimamba("export", "--ckpt", tiny.teacher, *args)
    assert answer.code == 1 and answer.err == f"bimamba: {sentence}"
    assert not Path("x").exists()


def test_an_export_that_is_given_as_a_checkpoint_is_told_as_one(tmp_path):
    export_torchscript(small(), tmp_path / "student.pt", None)
    with pytest.raises(UserError, match=r"student\.pt is an export, .* not read back; give a folder of this project"):
        load_lm(tmp_path / "student.pt")
