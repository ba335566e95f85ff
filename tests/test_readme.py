"""The README shows the quickstart's own commands, and its code runs as it stands."""

import re
import shlex
from pathlib import Path

import torch
from torch import nn

from bimamba_lit.binarize import BinaryLinear, PackedLinear, PTBLinear
from bimamba_lit.quickstart import STEPS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_quickstart_command_is_shown():
    shown = {
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
        for line in block.split("\n")
    }
    assert len(STEPS) == 7
    for _, command, _ in STEPS:
        assert f"bimamba {command}" in shown


def test_every_recipe_that_is_named_exists():
    named = set(re.findall(r"recipes/([a-z_]+\.yaml)", README))
    assert len(named) >= 3
    assert all((Path(__file__).parents[1] / "recipes" / name).is_file() for name in named)


def test_commands_for_several_devices_are_of_right_recipes_and_settings():
    from bimamba_lit.training.command_line import GROUPS
    from bimamba_lit.training.recipe_check import check_settings
    from bimamba_lit.training.recipe_read import read_settings

    section = README.split("## Several devices")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL) for line in block.split("\n")]
    commands = [shlex.split(line, comments=True) for line in lines if " -c recipes/" in line]
    assert {words[0] for words in commands} == {"bimamba", "torchrun", "srun"}
    for words in commands:
        settings = read_settings(words[words.index("-c") :])
        check_settings(settings, GROUPS)
        if words[0] == "torchrun":
            numbers = dict(zip(words, words[1:], strict=False))
            trainer = settings["trainer"]
            assert trainer["devices"] == int(numbers["--nproc_per_node"])
            assert trainer["num_nodes"] == int(numbers.get("--nnodes", 1))


def test_the_scheme_of_the_readme_trains_and_packs():
    (source,) = [block for block in PYTHON if "class RowsAndColumns" in block]
    names = {}
    exec(source, names)
    dense = nn.Linear(16, 8, bias=False)
    layer = names["RowsAndColumns"](dense)
    assert isinstance(layer, BinaryLinear)
    x = torch.randn(4, 16)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    torch.testing.assert_close(PackedLinear(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
    error = (layer.weight - dense.weight).norm() / dense.weight.norm()
    assert error < (torch.sign(dense.weight) - dense.weight).norm() / dense.weight.norm()


def test_the_calibration_of_the_readme_runs():
    (source,) = [block for block in PYTHON if "calibrate_(model" in block]
    names = {}
    exec(source, names)
    layers = [layer for layer in names["model"].modules() if isinstance(layer, PTBLinear)]
    assert len(layers) == 4 and layers[0].scheme == "ptb.GPTQ"


def test_the_python_of_the_readme_runs():
    (source,) = [block for block in PYTHON if "pack_(lm)" in block]
    names = {}
    exec(source, names)
    assert names["logits"].shape == (1, 32, 257)
    assert any(isinstance(layer, PackedLinear) for layer in names["lm"].modules())
