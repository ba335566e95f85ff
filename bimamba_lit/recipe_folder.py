"""The recipes that come with the package."""

from importlib.resources import files
from pathlib import Path

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing


def list_recipes() -> dict[str, str]:
    """Return the recipes' file names, each with the first line of its comment."""
    found = sorted((entry.name, entry.read_text(encoding="utf-8")) for entry in files("bimamba_lit.recipes").iterdir())
    return {name: text.split("\n", 1)[0].removeprefix("#").strip() for name, text in found if name.endswith(".yaml")}


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a recipe to ``folder`` and return where it is now.

    Raises:
        UserError: If there is no such recipe, or a file of that name is already there.
    """
    file = name if name.endswith(".yaml") else f"{name}.yaml"
    known = list_recipes()
    if file not in known:
        raise UserError(f"there is no recipe '{name}'{nearest(file, known) or '; `bimamba recipes` lists them'}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to copy the recipe to")
    target = folder / file
    if target.exists():
        raise UserError(f"{target} is there already: give another folder, or move it away")
    with replacing(target) as temporary:
        temporary.write_text(files("bimamba_lit.recipes").joinpath(file).read_text(encoding="utf-8"), encoding="utf-8")
    return target
