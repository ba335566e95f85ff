"""Making a model binary, and packing it."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.errors import UserError, nearest

Scheme = Callable[[nn.Linear], BinaryLinear]
Model = TypeVar("Model", bound=nn.Module)
TARGETS = ("in_proj", "out_proj")


def binarize_(model: Model, scheme: Scheme, targets: Sequence[str] = TARGETS) -> Model:
    """Replace every targeted ``nn.Linear`` of ``model`` by its binary form, in place.

    Args:
        model: Any module with ``nn.Linear`` layers, of this project or another.
        scheme: A scheme (``FBI``) or anything that makes a :class:`BinaryLinear` of an ``nn.Linear``.
        targets: fnmatch patterns, each tried on a layer's dotted name and on its last part. ``lm_head`` is taken only
            by a pattern that ends in that very name.

    Returns:
        ``model``.

    Raises:
        UserError: If a pattern matches no ``nn.Linear`` that is still in full precision, or ``scheme`` makes something
            else than a :class:`BinaryLinear`. The model is then as it was.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    linears = {name: layer for name, layer in model.named_modules() if name and _is_dense(layer)}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in linears):
            raise UserError(_no_match(pattern, linears))
    chosen = [name for name in linears if any(_matches(name, pattern) for pattern in patterns)]
    shared = _shared_parameters(model)
    binary = {}
    for name in chosen:
        layer = scheme(_untied(linears[name]) if id(linears[name].weight) in shared else linears[name])
        if not isinstance(layer, BinaryLinear):
            raise UserError(
                f"{scheme!r} is no binarization scheme: it makes a {type(layer).__name__}, not a BinaryLinear"
            )
        binary[name] = layer.train(linears[name].training)
    for name, layer in binary.items():
        model.set_submodule(name, layer)
    return model


def pack_(model: Model) -> Model:
    """Replace every :class:`BinaryLinear` of ``model`` by its :class:`PackedLinear`, in place; outputs stay the same.

    Raises:
        UserError: If the model has no binary layer to pack.
    """
    layers = [name for name, layer in model.named_modules() if name and isinstance(layer, BinaryLinear)]
    if not layers:
        raise UserError("nothing to pack: the model has no BinaryLinear layer; call binarize_ first")
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, BinaryLinear)
        model.set_submodule(name, PackedLinear(layer).train(layer.training))
    return model


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLinear | PackedLinear]]:
    """Yield the dotted name and the layer of every binary layer, latent or packed, in the model's order."""
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLinear | PackedLinear):
            yield name, layer


def _is_dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not isinstance(layer, BinaryLinear)


def _matches(name: str, pattern: str) -> bool:
    last = name.rpartition(".")[2]
    if last == "lm_head" and pattern.rpartition(".")[2] != "lm_head":
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(last, pattern)


def _no_match(pattern: str, linears: dict[str, nn.Module]) -> str:
    if not linears:
        return f"target '{pattern}' matches nothing: the model has no full-precision Linear layer left"
    parts = sorted({name.rpartition(".")[2] for name in linears})
    hint = nearest(pattern, [*parts, *linears]) or f"; its Linear layers end in {', '.join(parts)}"
    return f"target '{pattern}' matches no Linear layer of the model{hint}"


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _untied(linear: nn.Linear) -> nn.Linear:
    """Return a copy of a layer whose weight another module holds too, so that the two can part."""
    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().clone())
    if linear.bias is not None:
        copy.bias = nn.Parameter(linear.bias.detach().clone())
    return copy
