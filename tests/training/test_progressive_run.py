"""A student smaller than its teacher that becomes binary over its steps, as a recipe and its commands have it."""

import json

import pytest
import torch
import yaml

from bimamba_lit.models import MambaLM

STUDENT = {"d_model": 16, "n_layer": 2, "headdim": 8, "d_state": 8, "chunk_size": 16}
PROGRESSIVE = {"class_path": "bimamba_lit.callbacks.Progressive", "init_args": {"by": "mix", "end_step": 6}}
ANNEALED = {"class_path": "bimamba_lit.callbacks.AnnealedGradient", "init_args": {"end_step": 6}}
SCHEME = {
    "class_path": "bimamba_lit.binarize.FBI",
    "init_args": {"straight_through": "tanh", "reach": 1.5},
}


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("progressive")
    values = yaml.safe_load(tiny.distill_recipe.read_text())
    values["trainer"] |= {"default_root_dir": str(folder / "run"), "max_steps": 8, "callbacks": [PROGRESSIVE, ANNEALED]}
    values["model"]["init_args"] |= {"student": STUDENT, "binarizer": SCHEME}
    values["model"]["init_args"]["optimizer"]["total_steps"] = 8
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_an_unfinished_run_is_measured_and_written_as_it_is_and_goes_on(recipe, bimamba, tmp_path):
    run = recipe.parent / "run"

    def summary():
        return json.loads((run / "summary.json").read_text())

    answer = bimamba("fit", "-c", recipe, "--trainer.max_steps=3")
    assert answer.code == 0, answer.err
    size = next(line for line in answer.out.splitlines() if "MiB deployed" in line)
    cut = summary()
    assert cut["true_bits"] > 16 * cut["binarized_params"] and "unfinished" in cut["storage"]
    assert bimamba("validate", "-c", recipe, "--ckpt_path=last").code == 0
    assert summary()["bits_per_byte"] == cut["bits_per_byte"]

    checkpoint = run / "checkpoints" / "last.ckpt"
    (entry,) = torch.load(checkpoint, weights_only=True)["lm"]["binarization"]
    assert entry["unfinished"] == {"way": "mix", "share": 0.5}
    layer = MambaLM.from_pretrained(checkpoint).backbone.layers[0].mixer.in_proj
    halfway, layer.unfinished = layer.weight, None
    torch.testing.assert_close(halfway, 0.5 * layer.latent + 0.5 * layer.weight)

    answer = bimamba("export", "--ckpt", run, "--format", "torchscript", "--out", tmp_path / "model.pt")
    assert answer.code == 1 and "not binary yet (mix, 50% of the way)" in answer.err
    assert "Traceback" not in answer.err and not (tmp_path / "model.pt").exists()
    assert bimamba("generate", "--ckpt", run, "--prompt", "The", "--max_new_tokens", 2).code == 0

    answer = bimamba("fit", "-c", recipe, "--ckpt_path=last")
    assert answer.code == 0, answer.err
    assert size in answer.out.splitlines()
    found = summary()
    assert "unfinished" not in found["storage"] and found["true_bits"] < cut["true_bits"]
    assert bimamba("export", "--ckpt", run, "--format", "safetensors", "--out", tmp_path / "packed").code == 0
    whole = recipe.parent / "whole"
    assert bimamba("fit", "-c", recipe, f"--trainer.default_root_dir={whole}").code == 0
    ours, theirs = (MambaLM.from_pretrained(folder / "checkpoints" / "last.ckpt") for folder in (run, whole))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert ours.config.d_model == 16 and found["agreement"] is not None
