"""What is binary in a model, as plain values that a file can hold, and back.

A description names schemes by their class names. Only schemes that are already imported are found: reading a file never
imports what the file names.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn

from bimamba_lit.binarize.apply import quantized_layers, replace_
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PREFIX, PTBLinear, empty_parts
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.unfinished import Unfinished
from bimamba_lit.binarize.wrapper import Wrapper, innermost
from bimamba_lit.errors import UserError, nearest

Base = TypeVar("Base")


def describe_binarization(model: nn.Module) -> list[dict[str, Any]]:
    """Return one entry a kind of layer: ``scheme``, ``options``, ``packed`` and ``targets`` (dotted names).

    ``scheme`` is the class's name; of a post-training scheme with ``ptb.`` before it, and the entry also has ``parts``,
    the dtype and the shape of each part that is stored. Layers with rows in full precision also have ``kept_rows``,
    those with a share of inputs of two signs ``doubled_inputs``, those that are not binary yet ``unfinished``.
    """
    entries: list[dict[str, Any]] = []
    for name, layer in quantized_layers(model):
        kind = layer.kind() | {"packed": isinstance(innermost(layer), PackedLinear)}
        for entry in entries:
            if {key: value for key, value in entry.items() if key != "targets"} == kind:
                entry["targets"].append(name)
                break
        else:
            entries.append({**kind, "targets": [name]})
    return entries


def apply_binarization_(model: nn.Module, description: list[dict[str, Any]]) -> None:
    """Make the layers of a freshly built ``model`` binary or packed as ``description`` says, in place.

    The values are those of the model's own weights, or for post-training schemes any; load the saved ones afterwards.

    Raises:
        UserError: If a scheme is not known, its options do not fit, or a target is not in the model.
    """
    for entry in description:
        try:
            name, options, targets, packed = (entry[key] for key in ("scheme", "options", "targets", "packed"))
        except (KeyError, TypeError) as error:
            raise UserError(
                "the description of the binary layers must hold scheme, options, targets and packed"
            ) from error
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise UserError(f"the targets of a scheme must be a list of layers' names, not {targets!r}")
        kept = _kept_rows(entry, targets)
        doubled = dict.fromkeys(targets, entry["doubled_inputs"]) if "doubled_inputs" in entry else {}
        try:
            replace_(model, _maker(name, options, entry.get("parts")), targets, kept, doubled)
        except (TypeError, KeyError) as error:
            raise UserError(f"scheme '{name}' does not take the options {options}") from error
        take_unfinished_(model, [entry])
        if packed:
            for target, (place, layer) in _held(model, targets).items():
                if not isinstance(layer, BinaryLinear | PTBLinear):
                    raise UserError(f"the model has no binary layer {target!r}, which is said to be packed")
                model.set_submodule(place, PackedLinear(layer))


def _maker(name: object, options: Any, parts: Any) -> Callable[[nn.Linear], LatentLinear | PTBLinear]:
    """Return what makes a layer of the scheme of that name, trained or fitted after training."""
    if not str(name).startswith(PREFIX):
        return partial(_named(name, LatentLinear), **options)  # type: ignore[type-abstract]
    scheme = _named(name, PTBScheme, PREFIX)(**options)  # type: ignore[type-abstract]
    return lambda linear: PTBLinear(linear, scheme, empty_parts(parts))


def _held(model: nn.Module, targets: list[str]) -> dict[str, tuple[str, nn.Module | None]]:
    """Return the names and the layers of few bits that targets stand for: of a wrapper, what is inside."""
    layers = dict(model.named_modules())
    held: dict[str, tuple[str, nn.Module | None]] = {}
    for target in targets:
        place = target
        while isinstance(layers.get(place), Wrapper):
            place += ".binary"
        held[target] = place, layers.get(place)
    return held


def _kept_rows(entry: dict[str, Any], targets: list[str]) -> dict[str, list[str]]:
    names = entry.get("kept_rows", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the kept_rows of a scheme must be a list of names, not {names!r}")
    return dict.fromkeys(targets, names) if names else {}


def take_unfinished_(model: nn.Module, description: list[dict[str, Any]]) -> None:
    """Take over, in place, how far the binary layers of a model have come according to a description.

    Raises:
        UserError: If the description says it in another way than :func:`describe_binarization` does.
    """
    for entry in description:
        way = entry.get("unfinished")
        try:
            unfinished = None if way is None else Unfinished(**way)
        except TypeError as error:
            raise UserError(f"a layer that is not binary yet must have 'way' and 'share', not {way!r}") from error
        for _, layer in _held(model, entry["targets"]).values():
            if isinstance(layer, BinaryLinear):
                layer.unfinished = unfinished


def known_schemes(base: type[Base] = LatentLinear) -> dict[str, type[Base]]:  # type: ignore[assignment]
    """Return every scheme imported so far by its class name: the trained ones, or those of another base class."""
    found: dict[str, type[Base]] = {}
    queue = list(base.__subclasses__())
    while queue:
        scheme = queue.pop()
        if not inspect.isabstract(scheme):
            found[scheme.__name__] = scheme
        queue += scheme.__subclasses__()
    return found


def _named(name: object, base: type[Base], prefix: str = "") -> type[Base]:
    schemes = {prefix + key: scheme for key, scheme in known_schemes(base).items()}
    if not isinstance(name, str) or name not in schemes:
        hint = nearest(str(name), schemes) or f"; known are {', '.join(sorted(schemes))}"
        raise UserError(
            f"no binarization scheme '{name}' is known{hint}; "
            "a scheme of your own must be imported first (generate: --import MODULE)"
        )
    return schemes[name]
