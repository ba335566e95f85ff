"""Making a model binary, and packing it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from torch import nn

from bimamba_lit.binarize.coded import CodedLinear
from bimamba_lit.binarize.doubled_inputs import DoubledInputs, InputShares, inputs_to_double
from bimamba_lit.binarize.kept_rows import KeptRows, rows_to_keep
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.packed import PackedLinear
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.targets import TARGETS, dense_layers, put_
from bimamba_lit.binarize.wrapper import SchemeLayer, Wrapper, linear_of
from bimamba_lit.errors import UserError

Scheme = Callable[[nn.Linear], LatentLinear]
NO_ROWS: Mapping[str, Sequence[str]] = MappingProxyType({})
NO_INPUTS: InputShares = MappingProxyType({})
Model = TypeVar("Model", bound=nn.Module)


def binarize_(
    model: Model,
    scheme: Scheme,
    targets: Sequence[str] = TARGETS,
    keep_rows: Mapping[str, Sequence[str]] = NO_ROWS,
    double_inputs: InputShares = NO_INPUTS,
) -> Model:
    """Replace every targeted ``nn.Linear`` of ``model`` by its binary form, in place.

    Args:
        model: Any module with ``nn.Linear`` layers, of this project or another.
        scheme: A scheme (``FBI``) or anything that makes a :class:`LatentLinear` of an ``nn.Linear``.
        targets: fnmatch patterns, each tried on a layer's dotted name and on its last part. ``lm_head`` is taken only
            by a pattern that ends in that very name. A pattern after ``!`` leaves out layers that others take.
        keep_rows: Rows of these layers that stay in full precision, by their names, for patterns of layers as above:
            ``{"in_proj": ["B", "C", "dt"]}``. A mixer of this project names the rows of its projections in
            ``projection_rows``: z, x, B, C and dt of Mamba-2's ``in_proj``; x and z of Mamba-1's, dt, B and C of its
            ``x_proj``.
        double_inputs: The share of the inputs of these layers, 0 to 1, whose weights are the sum of two signs, for
            patterns likewise: ``{"in_proj": 0.15}``. Whole words of 32 inputs, those whose columns one sign fits
            worst; see :class:`DoubledInputs`. A list is of shares by depth, from the first of the layers that the
            pattern matches to the last: ``{"out_proj": [1, 0]}`` doubles all inputs in their first half and none in
            the second.

    Returns:
        ``model``.

    Raises:
        UserError: If a pattern matches no ``nn.Linear`` that is still in full precision, rows have other names, a
            share is out of range, ``scheme`` is none, does not fit a layer or makes something else than a
            :class:`LatentLinear`, or the model is itself an ``nn.Linear``. The model is then as it was.
    """
    if isinstance(scheme, nn.Module) or not callable(scheme):
        raise UserError(f"a scheme is a class, as FBI, or what makes a layer of an nn.Linear, not {scheme!r}")
    if isinstance(model, nn.Linear):
        raise UserError("the model is itself a Linear layer, which cannot be replaced in place: take scheme(model)")
    return replace_(model, partial(_made, scheme), targets, keep_rows, double_inputs)


def replace_(
    model: Model,
    make: Callable[[nn.Linear], LatentLinear | PTBLinear],
    targets: Sequence[str],
    keep_rows: Mapping[str, Sequence[str]],
    double_inputs: InputShares,
) -> Model:
    """Replace every targeted ``nn.Linear`` by what ``make`` makes of it, or of part of it, in place."""
    shared = _shared_parameters(model)
    made: dict[nn.Module, nn.Module] = {}
    dense = dense_layers(model, targets)
    kept = rows_to_keep(model, list(dense), keep_rows)
    doubled = inputs_to_double(list(dense), double_inputs)
    for name, linear in dense.items():
        whole = _untied(linear) if id(linear.weight) in shared else linear
        try:
            part = partial(DoubledInputs, scheme=make, share=doubled[name]) if name in doubled else make
            layer = KeptRows(whole, part, *kept[name]) if name in kept else part(whole)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        made[linear] = layer.train(linear.training)
    put_(model, made.items())
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
        UserError: If the model has no binary layer to pack or is one itself, a post-training result holds more than one
            sign a weight, or ``activation_bits`` is neither None nor 8. The model is then as it was.
    """
    if isinstance(model, _UNPACKED):
        raise UserError(
            "the model is itself a binary layer, which cannot be replaced in place: take packed_form(model)"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, _UNPACKED)]
    if not layers:
        packed_already = any(isinstance(layer, PackedLinear) for layer in model.modules())
        hint = "its binary layers are packed already" if packed_already else "call binarize_ first"
        raise UserError(f"nothing to pack: the model has no latent layer; {hint}")
    if activation_bits not in (None, 8):
        raise UserError(f"activation_bits must be None or 8, not {activation_bits}")
    put_(model, [(layer, packed_form(layer, activation_bits).train(layer.training)) for layer in layers])
    return model


_UNPACKED = (LatentLinear, PTBLinear)
QuantizedLinear = SchemeLayer | Wrapper


def packed_form(layer: LatentLinear | PTBLinear, activation_bits: int | None = None) -> PackedLinear | PTBLinear:
    """Return the packed form of a layer; see :func:`pack_`."""
    if isinstance(layer, CodedLinear):
        return layer.packed()
    assert isinstance(layer, BinaryLinear | PTBLinear)
    return PackedLinear(layer, activation_bits)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the dotted name and the layer of every layer held in few bits: latent, packed or fitted after training.

    A layer with rows in full precision or inputs with two signs comes as the whole that it is.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in layers.items():
        if not isinstance(layers.get(name.rpartition(".")[0]), Wrapper):
            yield name, layer


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLinear | PackedLinear]]:
    """Yield the dotted name and the layer of every binary layer, latent or packed, in the model's order.

    Of one with rows in full precision or inputs with two signs, the layer of the scheme that is inside.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLinear | PackedLinear):
            yield name, layer


def _made(scheme: Scheme, linear: nn.Linear) -> LatentLinear:
    layer = scheme(linear)
    if not isinstance(layer, LatentLinear):
        raise UserError(f"{scheme!r} is no binarization scheme: it makes a {type(layer).__name__}, not a LatentLinear")
    return layer


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _untied(linear: nn.Linear) -> nn.Linear:
    """Return a copy of a layer whose weight another module holds too, so that the two can part."""
    return linear_of(linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone())
