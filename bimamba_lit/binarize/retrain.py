"""Training on from what a post-training scheme made of a model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize.apply import NO_INPUTS, NO_ROWS, Scheme, binarize_
from bimamba_lit.binarize.doubled_inputs import InputShares
from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import TERMS, compose
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.targets import TARGETS, dense_layers, put_
from bimamba_lit.binarize.wrapper import linear_of

_ROUNDING = 1e-6


class Start(NamedTuple):
    """Where the layers of a model start from, in numbers of layers.

    Attributes:
        exact: Those that have signs and scales of the post-training result.
        near: Those whose latent weight is the result's dense weight, binarized again by the trained scheme.
    """

    exact: int
    near: int


def retrain_(
    model: nn.Module,
    scheme: Scheme | None,
    targets: Sequence[str] = TARGETS,
    keep_rows: Mapping[str, Sequence[str]] = NO_ROWS,
    double_inputs: InputShares = NO_INPUTS,
) -> Start:
    """Make trainable layers of the post-training results in a model, in place.

    A result of one sign a weight keeps its signs and scales where the trained scheme can hold them: ``FBI`` by row
    those of ``ptb.ScaledSign``, centred or not, and of 1-bit ``ptb.GPTQ`` in one group; ``TwoSided``, ``GroupScale``
    and ``ParetoQ`` those of ``ptb.ScaledSign``; ``ScaledSign`` and ``Sign`` those of their namesakes. Otherwise the
    latent weights start at the result's dense weight.

    Args:
        model: A model, with :class:`PTBLinear` layers or without.
        scheme: The trained scheme; None makes full-precision layers of the results.
        targets: Layers to make binary, as in :func:`bimamba_lit.binarize.binarize_`.
        keep_rows: Rows of these that stay in full precision, likewise; of a post-training result they start at its
            dense weight, as do the latent weights beside them.
        double_inputs: The share of the inputs of these with two signs, likewise; latent weights then start at the
            result's dense weight.

    Raises:
        UserError: If a target matches no layer, rows have other names, or a share is out of range.
    """
    dense = {layer: layer.dense() for layer in model.modules() if isinstance(layer, PTBLinear)}
    put_(model, dense.items())
    results = {id(linear): layer for layer, linear in dense.items()}
    if scheme is None:
        return Start(0, 0)
    exact: list[LatentLinear] = []

    def start(linear: nn.Linear) -> LatentLinear:
        result = results.get(id(linear))
        layer = None if result is None else _exact(scheme, linear, result)
        if layer is None:
            return scheme(linear)
        exact.append(layer)
        return layer

    fitted = sum(id(linear) in results for linear in dense_layers(model, targets).values())
    binarize_(model, start, targets, keep_rows, double_inputs)
    return Start(len(exact), fitted - len(exact))


@torch.no_grad()
def _exact(scheme: Scheme, linear: nn.Linear, result: PTBLinear) -> LatentLinear | None:
    """Return a trainable layer whose binary weight is that of ``result``, or None if the scheme has no such layer."""
    terms = result.terms()
    if terms is None:
        return None
    signs = ops.unpack_signs(result.packed_signs(), result.in_features)
    latent = compose(signs, {name: term for name, term in terms.items() if "scale" in name})
    layer = scheme(linear_of(latent, linear.bias))
    if _same(layer, result):
        return layer
    for name, parameter in layer.named_parameters(recurse=False):
        if name in TERMS and _broadcasts(value := terms.get(name, _neutral(name)), parameter):
            parameter.copy_(value)
    return layer if _same(layer, result) else None


def _same(layer: LatentLinear, result: PTBLinear) -> bool:
    return torch.allclose(layer.weight, result.weight.float(), rtol=_ROUNDING, atol=0.0)


def _neutral(name: str) -> Tensor:
    return torch.tensor([1.0 if "scale" in name else 0.0])


def _broadcasts(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape or value.numel() == 1
