"""Making a model binary, and packing it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from bimamba_lit.binarize.coded import CodedLinear
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.targets import TARGETS, dense_layers
from bimamba_lit.errors import UserError

Scheme = Callable[[nn.Linear], LatentLinear]
Model = TypeVar("Model", bound=nn.Module)


def binarize_(model: Model, scheme: Scheme, targets: Sequence[str] = TARGETS) -> Model:
    """Replace every targeted ``nn.Linear`` of ``model`` by its binary form, in place.

    Args:
        model: Any module with ``nn.Linear`` layers, of this project or another.
        scheme: A scheme (``FBI``) or anything that makes a :class:`LatentLinear` of an ``nn.Linear``.
        targets: fnmatch patterns, each tried on a layer's dotted name and on its last part. ``lm_head`` is taken only
            by a pattern that ends in that very name.

    Returns:
        ``model``.

    Raises:
        UserError: If a pattern matches no ``nn.Linear`` that is still in full precision, or ``scheme`` does not fit a
            layer or makes something else than a :class:`LatentLinear`. The model is then as it was.
    """
    shared = _shared_parameters(model)
    binary = {}
    for name, linear in dense_layers(model, targets).items():
        try:
            layer = scheme(_untied(linear) if id(linear.weight) in shared else linear)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if not isinstance(layer, LatentLinear):
            raise UserError(
                f"{scheme!r} is no binarization scheme: it makes a {type(layer).__name__}, not a LatentLinear"
            )
        binary[name] = layer.train(linear.training)
    for name, layer in binary.items():
        model.set_submodule(name, layer)
    return model


def pack_(model: Model, activation_bits: int | None = None) -> Model:
    """Replace every trained layer of ``model`` by its packed form, in place; outputs stay the same.

    That is a :class:`PackedLinear`, also of those results of post-training schemes that are one sign a weight; of a
    :class:`CodedLinear` it is a :class:`PTBLinear`.

    Args:
        model: Any module with binary layers.
        activation_bits: 8 for activations of 8 bits in the packed layers, whose outputs then differ by about a
            percent; see :class:`PackedLinear`.

    Raises:
        UserError: If the model has no binary layer to pack, a post-training result holds more than one sign a weight,
            or ``activation_bits`` is neither None nor 8. The model is then as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if name and isinstance(layer, _UNPACKED)}
    if not layers:
        raise UserError("nothing to pack: the model has no latent layer; call binarize_ first")
    if activation_bits not in (None, 8):
        raise UserError(f"activation_bits must be None or 8, not {activation_bits}")
    packed = {name: packed_form(layer, activation_bits).train(layer.training) for name, layer in layers.items()}
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    return model


_UNPACKED = (LatentLinear, PTBLinear)
QuantizedLinear = LatentLinear | PackedLinear | PTBLinear


def packed_form(layer: LatentLinear | PTBLinear, activation_bits: int | None = None) -> PackedLinear | PTBLinear:
    """Return the packed form of a layer; see :func:`pack_`."""
    if isinstance(layer, CodedLinear):
        return layer.packed()
    assert isinstance(layer, BinaryLinear | PTBLinear)
    return PackedLinear(layer, activation_bits)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the dotted name and the layer of every layer held in few bits: latent, packed or fitted after training."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield name, layer


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLinear | PackedLinear]]:
    """Yield the dotted name and the layer of every binary layer, latent or packed, in the model's order."""
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLinear | PackedLinear):
            yield name, layer


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
