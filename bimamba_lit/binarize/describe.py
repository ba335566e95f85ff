"""What is binary in a model, as plain values that a file can hold, and back.

A description names schemes by their class names. Only schemes that are already imported are found: reading a file never
imports what the file names.
"""

import inspect
from functools import partial
from typing import Any, TypeVar

from torch import nn

from bimamba_lit.binarize.apply import binarize_, quantized_layers
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PREFIX, PTBLinear, empty_parts
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.targets import dense_layers
from bimamba_lit.binarize.unfinished import Unfinished
from bimamba_lit.errors import UserError, nearest

Base = TypeVar("Base")


def describe_binarization(model: nn.Module) -> list[dict[str, Any]]:
    """Return one entry a kind of layer: ``scheme``, ``options``, ``packed`` and ``targets`` (dotted names).

    ``scheme`` is the class's name; of a post-training scheme with ``ptb.`` before it, and the entry also has ``parts``,
    the dtype and the shape of each part that is stored. Layers that are not binary yet also have ``unfinished``.
    """
    entries: list[dict[str, Any]] = []
    for name, layer in quantized_layers(model):
        kind = layer.kind() | {"packed": isinstance(layer, PackedLinear)}
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
        try:
            if str(name).startswith(PREFIX):
                scheme = _named(name, PTBScheme, PREFIX)(**options)  # type: ignore[type-abstract]
                for target, linear in dense_layers(model, targets).items():
                    model.set_submodule(target, PTBLinear(linear, scheme, empty_parts(entry.get("parts"))))
            else:
                trained = _named(name, LatentLinear)  # type: ignore[type-abstract]
                binarize_(model, partial(trained, **options), targets)
        except (TypeError, KeyError) as error:
            raise UserError(f"scheme '{name}' does not take the options {options}") from error
        take_unfinished_(model, [entry])
        if packed:
            layers = dict(model.named_modules())
            for target in targets:
                layer = layers.get(target)
                if not isinstance(layer, BinaryLinear | PTBLinear):
                    raise UserError(f"the model has no binary layer {target!r}, which is said to be packed")
                model.set_submodule(target, PackedLinear(layer))


def take_unfinished_(model: nn.Module, description: list[dict[str, Any]]) -> None:
    """Take over, in place, how far the binary layers of a model have come according to a description.

    Raises:
        UserError: If the description says it in another way than :func:`describe_binarization` does.
    """
    layers = dict(model.named_modules())
    for entry in description:
        way = entry.get("unfinished")
        try:
            unfinished = None if way is None else Unfinished(**way)
        except TypeError as error:
            raise UserError(f"a layer that is not binary yet must have 'way' and 'share', not {way!r}") from error
        for target in entry["targets"]:
            if isinstance(layer := layers.get(target), BinaryLinear):
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
