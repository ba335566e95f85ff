"""Which layers of a model are to be made binary."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard

from torch import nn

from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.wrapper import SchemeLayer, Wrapper, innermost
from bimamba_lit.errors import UserError, nearest

TARGETS = ("in_proj", "out_proj")
_NOT = "!"
_FewBits = SchemeLayer | Wrapper


def dense_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the full-precision ``nn.Linear`` layers that ``targets`` name, by dotted name; see :func:`binarize_`.

    Raises:
        UserError: If a pattern matches none, or nothing is left.
    """
    linears = {name: layer for name, layer in model.named_modules() if name and _is_dense(layer)}
    chosen: set[str] = set()
    left_out: set[str] = set()
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        pattern = target.removeprefix(_NOT)
        found = {name for name in linears if matches(name, pattern)}
        if not found:
            raise UserError(_made_already(model, pattern) or _no_match(pattern, linears))
        (left_out if target.startswith(_NOT) else chosen).update(found)
    if left_out >= chosen and targets:
        raise UserError(
            f"targets {', '.join(targets)} leave nothing: name layers first, then those of them to leave out"
        )
    return {name: layer for name, layer in linears.items() if name in chosen - left_out}


def put_(model: nn.Module, layers: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace each first layer of a pair by the second, in place, under every name that it has in the model."""
    new = dict(layers)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in new:
            model.set_submodule(name, new[layer])


def _is_dense(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a layer is an ``nn.Linear`` in full precision."""
    return isinstance(layer, nn.Linear) and not isinstance(layer, LatentLinear)


def matches(name: str, pattern: str) -> bool:
    """Say whether an fnmatch pattern is of a layer's dotted name or of its last part; ``lm_head`` only by that name."""
    last = name.rpartition(".")[2]
    if last == "lm_head" and pattern.rpartition(".")[2] != "lm_head":
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(last, pattern)


def matching(layers: Sequence[str], pattern: str, setting: str) -> list[str]:
    """Return the layers, by dotted name, of a pattern in a setting that is about some of the binary layers.

    Raises:
        UserError: If there are none.
    """
    found = [layer for layer in layers if matches(layer, pattern)]
    if not found:
        parts = sorted({layer.rpartition(".")[2] for layer in layers})
        hint = nearest(pattern, [*parts, *layers]) or f", which end in {', '.join(parts)}"
        raise UserError(f"{setting}: '{pattern}' matches no layer that is made binary{hint}")
    return found


def _made_already(model: nn.Module, pattern: str) -> str | None:
    """Say what to do where the layers of a pattern are of few bits already; None where there are none such."""
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, _FewBits) and matches(name, pattern)]
    if not layers:
        return None
    schemes = ", ".join(sorted({str(layer.kind()["scheme"]) for layer in layers}))
    latent = all(isinstance(innermost(layer), LatentLinear) for layer in layers)
    hint = ", or train this one on as it is with the binarizer null" if latent else ""
    return (
        f"target '{pattern}' matches no full-precision Linear layer: those that it names are of few bits already "
        f"({schemes}); start from a full-precision model{hint}"
    )


def _no_match(pattern: str, linears: dict[str, nn.Linear]) -> str:
    if not linears:
        return f"target '{pattern}' matches nothing: the model has no full-precision Linear layer left"
    parts = sorted({name.rpartition(".")[2] for name in linears})
    hint = nearest(pattern, [*parts, *linears]) or f"; its Linear layers end in {', '.join(parts)}"
    return f"target '{pattern}' matches no Linear layer of the model{hint}"
