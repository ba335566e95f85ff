"""Sharded training in two processes on a CPU, through the command that a user types."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

CALLBACKS = [
    {"class_path": f"bimamba_lit.callbacks.{name}", "init_args": {"every_n_steps": 2}}
    for name in ("BitFlips", "WeightScales")
]
CALLBACKS.append(
    {
        "class_path": "bimamba_lit.callbacks.Samples",
        "init_args": {"prompt": "The ", "max_new_tokens": 5, "every_n_steps": 2},
    }
)
STRATEGY = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


def recipe(tiny, path: Path, devices: int, **trainer: object) -> Path:
    settings = yaml.safe_load(tiny.distill_recipe.read_text())
    settings["trainer"] |= {"gradient_clip_val": 1.0, "callbacks": CALLBACKS, "devices": devices, **trainer}
    settings["trainer"]["default_root_dir"] = str(path)
    settings["model"]["init_args"] |= {"activation_checkpointing": True, "hidden_weight": 0.1}
    settings["model"]["init_args"]["keep_rows"] = {"in_proj": ["dt"]}
    settings["model"]["init_args"]["double_inputs"] = {"out_proj": 0.1}
    settings["model"]["init_args"]["optimizer"]["total_steps"] = 6
    settings["data"]["init_args"]["batch_size"] = 4 // devices
    if devices > 1:
        settings["trainer"]["strategy"] = STRATEGY
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return file


def fit(file: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bimamba_lit", "fit", "-c", str(file), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def checkpoint(path: Path) -> dict:
    return torch.load(path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(tiny, tmp_path):
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    done = [
        fit(recipe(tiny, one, 1, max_steps=6)),
        fit(recipe(tiny, two, 2, max_steps=6)),
        fit(recipe(tiny, stopped, 2, max_steps=3)),
        fit(recipe(tiny, stopped, 2, max_steps=6), "--ckpt_path=last"),
    ]
    assert all(run.returncode == 0 for run in done), [run.stderr[-2000:] for run in done]
    alone, shared, resumed = checkpoint(one), checkpoint(two), checkpoint(stopped)
    assert alone["state_dict"].keys() == shared["state_dict"].keys()
    for name, value in alone["state_dict"].items():
        assert torch.allclose(value, shared["state_dict"][name], atol=1e-6), name
        assert torch.equal(resumed["state_dict"][name], shared["state_dict"][name]), name
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    # Weight decay leaves the same parameters alone: the marks on them survive the sharding.
    sizes = [
        [len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]] for saved in (alone, shared)
    ]
    assert sizes[0] == sizes[1]
    last = [rows(path)[-1]["val/loss"] for path in (one, two, stopped)]
    assert float(last[0]) == pytest.approx(float(last[1]), rel=1e-5) and last[1] == last[2]
    for key in ("flips/rate", "flips/since_start", "scales/backbone.layers.0.mixer.in_proj.binary/mean"):
        ours, theirs, again = ([float(row[key]) for row in rows(path) if row[key]] for path in (one, two, stopped))
        assert len(ours) == 3 and ours == pytest.approx(theirs, rel=1e-5), key
        assert theirs == again, key


@pytest.mark.slow
def test_tensor_parallelism_is_refused_in_a_sentence(tiny, tmp_path):
    file = recipe(tiny, tmp_path / "run", 2, max_steps=1)
    settings = yaml.safe_load(file.read_text())
    settings["trainer"]["strategy"]["init_args"] |= {"data_parallel_size": 1, "tensor_parallel_size": 2}
    file.write_text(yaml.safe_dump(settings))
    run = fit(file)
    assert run.returncode == 1 and "tensor_parallel_size is 2" in run.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both_processes(tiny, tmp_path):
    file = recipe(tiny, tmp_path / "run", 2, max_steps=6)
    run = fit(file, "--model.optimizer.lr=1e30", "--model.optimizer.warmup_steps=0")
    assert run.returncode == 1 and "training stopped before optimizer step" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["ParetoQ", "Ternary", "TwoBit"])
def test_other_schemes_train_in_two_processes_as_in_one(scheme, tiny, tmp_path):
    files = [recipe(tiny, tmp_path / f"{devices}", devices, max_steps=3) for devices in (1, 2)]
    doubled = [] if scheme == "ParetoQ" else ["--model.double_inputs={}"]  # which is of schemes of one sign a weight
    for run in [fit(file, f"--model.binarizer=bimamba_lit.binarize.{scheme}", *doubled) for file in files]:
        assert run.returncode == 0, run.stderr[-2000:]
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("1", "2"))
    assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in one.items())
    bits = [json.loads((tmp_path / name / "summary.json").read_text())["true_bits"] for name in ("1", "2")]
    assert bits[0] == bits[1]
