"""Every recipe names right keys and values and explains each of them."""

from pathlib import Path

import pytest

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
    assert lines[0].startswith("# ")
    for above, line in zip(lines, lines[1:], strict=False):
        is_group = line.rstrip().endswith(":") or line.strip().removeprefix("- ").startswith("class_path:")
        explained = "#" in line or above.strip().startswith("#")
        assert not line.strip() or is_group or explained, f"{path.name}: {line}"


def test_there_are_recipes():
    assert "quickstart_teacher.yaml" in [path.name for path in RECIPES]
