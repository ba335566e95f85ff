"""Other packages, each used only where it is installed; nothing of theirs is needed."""

import importlib
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@cache
def mamba_ssm(module: str) -> Any:
    """Return a module of mamba_ssm by its name inside it, or None where it cannot be imported.

    Its top package imports a CUDA extension that its Triton ops do not need; where that is missing, it is stepped over.
    """
    spec = find_spec("mamba_ssm")
    if spec is None:
        return None
    try:
        importlib.import_module("mamba_ssm")
    except Exception:
        package = ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec  # without it the package cannot be looked up again
        sys.modules["mamba_ssm"] = package
    return installed(f"mamba_ssm.{module}")


@cache
def installed(module: str) -> Any:
    """Return a module, or None where it is not installed or does not work here."""
    try:
        return importlib.import_module(module)
    except Exception:
        return None


def versions() -> str:
    """Return the peers that are installed, with their versions where known."""
    found = []
    for name in ("mamba_ssm", "causal_conv1d", "gemlite"):
        if find_spec(name) is not None:
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                found.append(name)
    return ", ".join(found) or "no peers installed"
