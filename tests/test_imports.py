"""Imports go one way: a module imports only what lies on a lower level."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bimamba_lit

PACKAGE = Path(bimamba_lit.__file__).parent
LEVELS = [
    {"__main__"},
    {"cli"},
    {"training", "report", "bench", "quickstart"},
    {"callbacks", "eval", "export"},
    {"distill", "data"},
    {"models"},
    {"binarize"},
    {"ops"},
    {"kernels"},
    {"recipe_folder"},
    {"errors", "files", "hub", "interruption"},
]
# `training` writes the summaries that `report` reads; `quickstart` is a run and a comparison.
SIDEWAYS = {
    ("training", "report"),
    ("quickstart", "cli"),
    ("quickstart", "training"),
    ("quickstart", "report"),
    ("files", "errors"),
    ("hub", "errors"),
    ("interruption", "errors"),
}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"] + [
    path for link in ("kernels", "callbacks") for path in (PACKAGE / link).resolve().rglob("*.py")
]


def part(path: Path) -> str:
    """Return which part of the package a file belongs to."""
    folder = PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent
    return path.relative_to(folder).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the dotted names a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_a_level():
    assert {part(path) for path in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{part(path)}/{path.name}")
def test_imports_go_down(path):
    own = part(path)
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first != "bimamba_lit" or rest.split(".")[0] in ("", own):
            continue
        other = rest.split(".")[0]
        if other in ("MambaConfig", "MambaLM", "__version__"):
            other = "models"
        assert LEVEL[own] < LEVEL[other] or (own, other) in SIDEWAYS, f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if part(path) == "kernels"], ids=str)
def test_kernels_stand_alone(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imported(path):
        assert name.split(".")[0] in allowed or name.startswith("bimamba_lit.kernels."), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import bimamba_lit; from bimamba_lit import ops", "lightning datasets transformers safetensors"),
        ("import bimamba_lit.cli", "lightning datasets transformers"),
        ("import bimamba_lit.bench.gpu", "lightning datasets transformers torchdata"),
    ],
)
def test_what_an_import_leaves_out(code, absent):
    check = f"{code}; import sys; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
