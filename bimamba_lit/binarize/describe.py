"""What is binary in a model, as plain values that a file can hold, and back.

A description names schemes by their class names. Only schemes that are already imported are found: reading a file never
imports what the file names.
"""

from functools import partial
from typing import Any, TypeVar

from torch import nn

from bimamba_lit.binarize.apply import binarize_, quantized_layers
from bimamba_lit.binarize.kept_rows import KeptRows
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PREFIX, PTBLinear, empty_parts
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.targets import dense_layers
from bimamba_lit.errors import UserError, nearest

Base = TypeVar("Base")


def describe_binarization(model: nn.Module) -> list[dict[str, Any]]:
    """Return one entry a kind of layer: ``scheme``, ``options``, ``packed`` and ``targets`` (dotted names).

    ``scheme`` is the class's name; of a post-training scheme with ``ptb.`` before it, and the entry also has ``parts``,
    the dtype and the shape of each part that is stored. Layers with rows in full precision also have ``kept_rows``.
    """
    entries: list[dict[str, Any]] = []
    for name, layer in quantized_layers(model):
        held = layer.binary if isinstance(layer, KeptRows) else layer
        kind = layer.kind() | {"packed": isinstance(held, PackedLinear)}
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
                trained = _named(name, BinaryLinear)  # type: ignore[type-abstract]
                binarize_(model, partial(trained, **options), targets, _kept_rows(entry, targets))
        except (TypeError, KeyError) as error:
            raise UserError(f"scheme '{name}' does not take the options {options}") from error
        if packed:
            layers = dict(model.named_modules())
            for target in targets:
                place = f"{target}.binary" if isinstance(layers.get(target), KeptRows) else target
                layer = layers.get(place)
                if not isinstance(layer, BinaryLinear | PTBLinear):
                    raise UserError(f"the model has no binary layer {target!r}, which is said to be packed")
                model.set_submodule(place, PackedLinear(layer))


def _kept_rows(entry: dict[str, Any], targets: list[str]) -> dict[str, list[str]]:
    names = entry.get("kept_rows", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the kept_rows of a scheme must be a list of names, not {names!r}")
    return dict.fromkeys(targets, names) if names else {}


def known_schemes(base: type[Base] = BinaryLinear) -> dict[str, type[Base]]:  # type: ignore[assignment]
    """Return every scheme imported so far by its class name: the trained ones, or those of another base class."""
    found: dict[str, type[Base]] = {}
    queue = list(base.__subclasses__())
    while queue:
        scheme = queue.pop()
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
