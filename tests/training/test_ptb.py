"""Post-training binarization as runs, and training that starts from them, as a user has them."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI, PTBLinear, binary_layers, ptb
from bimamba_lit.distill import find_checkpoint
from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import load_lm
from bimamba_lit.models.count import storage_by_part
from bimamba_lit.training import PTB, Distill


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """A recipe that calibrates the tiny teacher on ten sequences: two batches and a half."""
    folder = tmp_path_factory.mktemp("ptb")
    settings = yaml.safe_load(tiny.teacher_recipe.read_text())
    settings["trainer"] |= {"max_steps": 1, "default_root_dir": str(folder / "run")}
    scheme = {"class_path": "bimamba_lit.binarize.ptb.GPTQ", "init_args": {"group_size": 32}}
    settings["model"] = {
        "class_path": "bimamba_lit.training.PTB",
        "init_args": {"teacher": str(tiny.teacher), "scheme": scheme, "sequences": 10},
    }
    path = folder / "ptb.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, bimamba):
    """A finished run of it."""
    answer = bimamba("fit", "-c", recipe)
    assert answer.code == 0, answer.err
    folder = recipe.parent / "run"
    assert f"{folder}: {summary(folder)['bits_per_byte']:.3f} bits per byte after 1 step;" in answer.out
    assert "warm-up" not in answer.out
    assert re.match(r"MambaLM: 16,\d+ parameters, to be binarized by ptb.GPTQ, \S+ MiB deployed before\n", answer.out)
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_fit_is_the_calibration_on_the_first_training_sequences(run, tiny, recipe):
    from bimamba_lit.data import TextDataModule

    data = TextDataModule(**yaml.safe_load(recipe.read_text())["data"]["init_args"])
    data.setup("fit")
    rows = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])[:10]
    by_hand = ptb.calibrate_(
        load_lm(find_checkpoint(tiny.teacher)), ptb.GPTQ(group_size=32), [rows[:4], rows[4:8], rows[8:]]
    )
    lm = load_lm(find_checkpoint(run))
    assert sum(isinstance(layer, PTBLinear) for layer in lm.modules()) == 2
    assert all(torch.equal(value, by_hand.state_dict()[name]) for name, value in lm.state_dict().items())


def test_a_run_has_its_files_and_tells_its_bits(run, tiny):
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints", "metrics.csv", "summary.json"}
    found, lm = summary(run), load_lm(find_checkpoint(run))
    assert (found["scheme"], found["tokens_seen"], Path(found["teacher"]).name) == ("ptb.GPTQ", 10 * 32, "teacher")
    assert found["storage"] == storage_by_part(lm) and set(found["storage"]) > {"codes", "scales", "zeros"}
    assert found["true_bits"] == sum(found["storage"].values()) < summary(tiny.teacher)["true_bits"]
    assert 0 <= found["agreement"] < 1
    with (run / "metrics.csv").open() as file:
        (told,) = [float(row["ptb/bits_per_weight"]) for row in csv.DictReader(file) if row["ptb/bits_per_weight"]]
    stored = [layer for layer in lm.modules() if isinstance(layer, PTBLinear)]
    bits = sum(sum(layer.storage().values()) for layer in stored)
    weights = sum(layer.weight.numel() for layer in stored)
    assert told == pytest.approx(bits / weights) and told == pytest.approx(2 + 24 / 32)  # groups of 32


def test_validate_generate_and_compare_work_on_a_run(run, tiny, recipe, bimamba, tmp_path):
    before = summary(run)
    answer = bimamba("validate", "-c", recipe, "--ckpt_path=last")
    assert answer.code == 0 and summary(run) | {"seconds": 0} == before | {"seconds": 0}, answer.err
    answer = bimamba("generate", "--ckpt", run, "--prompt", "The", "--max_new_tokens", "4")
    assert answer.code == 0 and answer.out.startswith("The")
    answer = bimamba("compare", tiny.teacher, run, "--out", tmp_path)
    assert answer.code == 0, answer.err
    report = (tmp_path / "report.md").read_text()
    bits = sum(n for part, n in before["storage"].items() if part != "full_precision") / before["binarized_params"]
    assert "ptb.GPTQ" in report and f" {bits:.2f} " in report
    answer = bimamba("fit", "-c", recipe)
    assert answer.code == 1 and "holds a finished run" in answer.err


def test_a_scheme_is_swapped_on_the_command_line(recipe, bimamba, tmp_path):
    args = ["fit", "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert (
        bimamba(
            *args,
            "--model.scheme=bimamba_lit.binarize.ptb.GPTQ",
            "--model.scheme.bits=1",
            "--model.scheme.group_size=null",
        ).code
        == 0
    )
    assert bimamba(*args, "--model.scheme=ARBRC").code == 0
    answer = bimamba(*args, "--model.scheme=Sign", "--trainer.max_steps=7")
    assert answer.code == 0 and "after 1 step;" in answer.out
    schemes = [summary(folder)["scheme"] for folder in sorted(tmp_path.iterdir())]
    assert schemes == ["ptb.GPTQ", "ptb.ARBRC", "ptb.Sign"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["scheme"]["init_args"] == {"bits": 1, "group_size": None}


WRONG = {
    "too little text": (["--model.sequences=1000"], "1000 are wanted and the training text has 53"),
    "no sequences": (["--model.sequences=0"], "model.sequences: 0 is out of range"),
    "no scheme": (["--model.scheme=FBI"], "there is no PTBScheme 'FBI'"),
    "an option of another": (["--model.scheme=Sign", "--model.scheme.bits=2"], "has no key 'bits'"),
    "bits": (["--model.scheme.bits=5"], "GPTQ's bits are one of"),
    "a group that does not divide": (["--model.scheme.group_size=7"], "group_size=7 does not divide"),
    "no such layer": (["--model.targets=[in_porj]"], "did you mean 'in_proj'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_told_in_one_sentence_and_leaves_no_result(name, recipe, bimamba, tmp_path):
    more, sentence = WRONG[name]
    answer = bimamba("fit", "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", *more)
    assert answer.code == 1 and sentence in answer.err and "Traceback" not in answer.err
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("summary.json"))


def test_a_broken_model_is_told_and_leaves_no_result(recipe, bimamba, tiny, tmp_path):
    lm = load_lm(find_checkpoint(tiny.teacher))
    lm.backbone.layers[0].mixer.out_proj.weight.data[0, 0] = float("nan")
    lm.save_pretrained(tmp_path / "broken")
    args = ["fit", "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.num_sanity_val_steps=0"]
    answer = bimamba(*args, f"--model.teacher={tmp_path / 'broken'}")
    assert answer.code == 1 and "backbone.layers.0.mixer.out_proj: the weight holds 1 values that are NaN" in answer.err
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("summary.json"))


def test_nothing_is_measured_before_it_is_calibrated(recipe, bimamba, tmp_path):
    for command in ("validate", "test"):
        data = ["--data.test=" + yaml.safe_load(recipe.read_text())["data"]["init_args"]["val"]]
        answer = bimamba(command, "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", *data)
        assert answer.code == 1 and "nothing is calibrated yet: run `bimamba fit`" in answer.err


def test_a_checkpoint_of_another_scheme_is_refused(run, recipe, bimamba, tmp_path):
    last = run / "checkpoints" / "last.ckpt"
    args = ["validate", "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", f"--ckpt_path={last}"]
    answer = bimamba(*args, "--model.scheme.bits=3")
    assert answer.code == 1 and "holds another model than the recipe builds" in answer.err


def test_more_than_one_device_is_refused():
    module = PTB("somewhere", ptb.Sign())
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(UserError, match="calibration runs on one device, not on 2"):
        module.on_fit_start()


def test_a_teacher_that_is_no_mamba_model_is_refused(monkeypatch):
    monkeypatch.setattr("bimamba_lit.training.ptb.load_teacher", lambda *_: object())
    with pytest.raises(UserError, match="is no Mamba model; bimamba_lit.binarize.ptb.calibrate_ takes any"):
        PTB("somewhere", ptb.Sign()).configure_model()


@pytest.fixture(scope="module")
def scaled(recipe, bimamba):
    """A run of one sign a weight."""
    folder = recipe.parent / "scaled"
    answer = bimamba("fit", "-c", recipe, "--model.scheme=ScaledSign", f"--trainer.default_root_dir={folder}")
    assert answer.code == 0, answer.err
    return folder


def by_row(linear):
    return FBI(linear, pattern="row")


def test_a_student_starts_from_signs_and_scales_of_a_run(scaled, run, tiny):
    ids = torch.arange(40)[None]
    student = Distill(str(tiny.teacher), by_row, student=str(scaled))
    student.configure_model()
    assert len(list(binary_layers(student.lm))) == 2
    torch.testing.assert_close(student.lm(ids).logits, MambaLM.from_pretrained(find_checkpoint(scaled))(ids).logits)
    near = Distill(str(tiny.teacher), by_row, student=str(run))
    near.configure_model()
    result = load_lm(find_checkpoint(run)).backbone.layers[0].mixer.in_proj.weight
    assert torch.equal(near.lm.backbone.layers[0].mixer.in_proj.latent, result)


def test_distilling_from_a_run(scaled, tiny, bimamba, tmp_path):
    args = ["-c", tiny.distill_recipe, f"--model.student={scaled}", "--model.binarizer.pattern=row"]
    args += [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    answer = bimamba("validate", *args)
    assert answer.code == 0, answer.err
    start = summary(tmp_path / "run")
    assert start["bits_per_byte"] == pytest.approx(summary(scaled)["bits_per_byte"], abs=1e-4)
    assert "latent weights" in bimamba("estimate", *args).out
    answer = bimamba("fit", *args, "--trainer.max_steps=6")
    assert answer.code == 0, answer.err
    found = summary(tmp_path / "run")
    assert found["scheme"] == "FBI" and found["bits_per_byte"] < start["bits_per_byte"]


def test_a_student_of_another_vocabulary_or_from_nowhere_is_refused(tiny, tmp_path):
    from dataclasses import replace

    teacher = load_lm(find_checkpoint(tiny.teacher))
    MambaLM(replace(teacher.config, vocab_size=40)).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="model.student: .* has a vocabulary of 40 tokens"):
        Distill(str(tiny.teacher), FBI, student=str(tmp_path / "small")).configure_model()
    with pytest.raises(UserError, match="there is no file or folder"):
        Distill(str(tiny.teacher), FBI, student=str(tmp_path / "smoll")).configure_model()
