"""Which layers of a model are to be made binary."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard

from torch import nn

from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.errors import UserError, nearest

TARGETS = ("in_proj", "out_proj")


def dense_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the full-precision ``nn.Linear`` layers that ``targets`` name, by dotted name; see :func:`binarize_`.

    Raises:
        UserError: If a pattern matches none.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    linears = {name: layer for name, layer in model.named_modules() if name and _is_dense(layer)}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in linears):
            raise UserError(_no_match(pattern, linears))
    return {name: layer for name, layer in linears.items() if any(_matches(name, pattern) for pattern in patterns)}


def _is_dense(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a layer is an ``nn.Linear`` in full precision."""
    return isinstance(layer, nn.Linear) and not isinstance(layer, LatentLinear)


def _matches(name: str, pattern: str) -> bool:
    last = name.rpartition(".")[2]
    if last == "lm_head" and pattern.rpartition(".")[2] != "lm_head":
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(last, pattern)


def _no_match(pattern: str, linears: dict[str, nn.Linear]) -> str:
    if not linears:
        return f"target '{pattern}' matches nothing: the model has no full-precision Linear layer left"
    parts = sorted({name.rpartition(".")[2] for name in linears})
    hint = nearest(pattern, [*parts, *linears]) or f"; its Linear layers end in {', '.join(parts)}"
    return f"target '{pattern}' matches no Linear layer of the model{hint}"
