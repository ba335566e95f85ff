"""The packages that pyproject.toml lists are those in the tree: a missing one would be missing from the wheel."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKS = ("kernels", "callbacks", "recipes")


def test_every_folder_with_code_is_listed():
    inside = {path.parent.relative_to(ROOT) for path in (ROOT / "bimamba_lit").rglob("*.py")}
    found = {".".join(folder.parts) for folder in inside}
    for link in LINKS:
        folders = {path.parent.relative_to(ROOT) for path in (ROOT / link).rglob("*.py")} | {Path(link)}
        found |= {".".join(("bimamba_lit", *folder.parts)) for folder in folders}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_the_mapping_names_the_folders_at_the_top():
    expected = {"bimamba_lit": "bimamba_lit"} | {f"bimamba_lit.{link}": link for link in LINKS}
    assert SETUPTOOLS["package-dir"] == expected


def test_kernels_is_a_namespace():
    # With an __init__.py it would hide the package `kernels` that transformers needs.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("link", LINKS)
def test_links_point_to_the_top(link):
    path = ROOT / "bimamba_lit" / link
    assert path.is_symlink() and path.readlink() == Path("..") / link and path.is_dir()
