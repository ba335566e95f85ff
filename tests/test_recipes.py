"""Every recipe names right keys and values and explains each of them."""

from pathlib import Path

import pytest
import torch

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_right(path):
    from bimamba_lit.training.command_line import GROUPS
    from bimamba_lit.training.recipe_check import check_settings
    from bimamba_lit.training.recipe_read import read_settings

    settings = read_settings(["-c", str(path)])
    assert {"trainer", "model", "data"} <= settings.keys()
    check_settings(settings, GROUPS)
    assert settings["trainer"]["default_root_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_key_of_a_recipe_has_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith("."), "`bimamba recipes` shows the first line alone"
    for above, line in zip(lines, lines[1:], strict=False):
        is_group = line.rstrip().endswith(":") or line.strip().removeprefix("- ").startswith("class_path:")
        explained = "#" in line or above.strip().startswith("#")
        assert not line.strip() or is_group or explained, f"{path.name}: {line}"


def test_there_are_recipes():
    assert "quickstart_teacher.yaml" in [path.name for path in RECIPES]


# The paper's table: share of the full-precision model's weights that become binary, fp16 GiB (not given at a
# vocabulary of 32000) and 1-bit GiB.
TABLE = [
    ("780m", 50288, 0.900, 1.453, 0.228),
    ("780m", 32000, 0.933, None, 0.176),
    ("1.3b", 50288, 0.922, 2.503, 0.340),
    ("1.3b", 32000, 0.949, None, 0.270),
    ("2.7b", 50288, 0.952, 5.034, 0.545),
    ("2.7b", 32000, 0.968, None, 0.458),
]


@pytest.mark.parametrize(("size", "vocabulary", "share", "full", "binary"), TABLE)
@pytest.mark.parametrize("ending", ["", "_mamba2_teacher"])
def test_the_papers_sizes_are_the_papers(size, vocabulary, share, full, binary, ending):
    from bimamba_lit import MambaConfig, MambaLM, binarize
    from bimamba_lit.models.count import count_parameters, true_bits

    model = read(f"bimamba_{size}{ending}")["model"]["init_args"]
    with torch.device("meta"):
        lm = MambaLM(MambaConfig(vocab_size=vocabulary, **model["student"]))
        weights, gib = count_parameters(lm).total, true_bits(lm) / 8 / 1024**3
        binarize.binarize_(lm, binarize.FBI, model["targets"])
    assert round(count_parameters(lm).binarized / weights, 3) == share
    assert full is None or round(gib, 3) == full
    assert round(true_bits(lm) / 8 / 1024**3, 3) == binary


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("bimamba_")], ids=lambda p: p.name)
def test_a_step_has_the_papers_tokens_and_settings(path):
    recipe = read(path.stem)
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    devices = trainer["devices"] * trainer.get("num_nodes", 1)
    sequences = devices * trainer["accumulate_grad_batches"] * data["batch_size"]
    assert (sequences, sequences * data["context"]) == (256, 524_288)
    assert recipe["seed_everything"] == 11111
    assert (trainer["gradient_clip_val"], trainer["precision"]) == (1.0, "bf16-mixed")
    assert recipe["model"]["init_args"]["optimizer"] == {
        "lr": 2.5e-4,
        "min_lr": 2.5e-5,
        "warmup_steps": 2000,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
    }
    if devices > 1:
        strategy = trainer["strategy"]["init_args"]
        assert (strategy["data_parallel_size"], strategy["tensor_parallel_size"]) == (devices, 1)


def read(stem):
    from bimamba_lit.training.recipe_read import read_settings

    return read_settings(["-c", str(Path(__file__).parents[1] / "recipes" / f"{stem}.yaml")])
