"""The released Bi-Mamba form: mamba_ssm's names, and ``wscale`` and ``wbias`` beside every latent weight.

The layer computes ``wscale sign(weight) + wbias`` (arXiv 2411.11843; FBI-Linear of arXiv 2407.07093), which is `FBI`.
Scale and shift are (1, I) for the pattern ``column``, (O, 1) for ``row`` and one number for ``single``; which a layer
has is told by its shapes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.binarize import FBI, BinaryLinear, PackedLinear, PTBLinear, Wrapper, quantized_layers
from bimamba_lit.binarize.apply import QuantizedLinear
from bimamba_lit.errors import UserError
from bimamba_lit.models.dense import dense_tensors
from bimamba_lit.models.lm import MambaLM
from bimamba_lit.models.weight_files import Reader

_SCALE, _SHIFT = ".wscale", ".wbias"


def is_bi_mamba(readers: Mapping[str, Reader]) -> bool:
    """Tell whether tensors, by name, are those of the released Bi-Mamba form."""
    return any(name.endswith(_SCALE) for name in readers)


def from_bi_mamba(readers: Mapping[str, Reader]) -> tuple[dict[str, Reader], list[dict[str, Any]]]:
    """Return the tensors under our names, and what is binary as ``describe_binarization`` tells it.

    Raises:
        UserError: If a layer lacks its latent weight, its scale or its shift, or their shapes do not fit.
    """
    ours = dict(readers)
    targets: dict[str, list[str]] = {}
    for layer in sorted({name.rpartition(".")[0] for name in readers if name.endswith((_SCALE, _SHIFT))}):
        for part in (".weight", _SCALE, _SHIFT):
            if layer + part not in readers:
                raise UserError(f"it lacks {layer}{part}, which a layer of the Bi-Mamba form has")
        pattern = _pattern(layer, readers)
        side = "in" if pattern == "column" else "out"
        ours[f"{layer}.latent"] = ours.pop(f"{layer}.weight")
        ours[f"{layer}.{side}_scale"] = partial(_flat, ours.pop(layer + _SCALE))
        ours[f"{layer}.{side}_shift"] = partial(_flat, ours.pop(layer + _SHIFT))
        targets.setdefault(pattern, []).append(layer)
    options = {"straight_through": "identity"}
    return ours, [
        {"scheme": FBI.__name__, "options": {"pattern": pattern, **options}, "packed": False, "targets": layers}
        for pattern, layers in targets.items()
    ]


def to_bi_mamba(lm: MambaLM) -> dict[str, Tensor]:
    """Return the state of a model in the released Bi-Mamba form; a packed layer's signs are its latent weights.

    Raises:
        UserError: If nothing is binary, or a layer needs more than one scale and one shift by column, row or matrix.
    """
    layers = dict(quantized_layers(lm))
    if not layers:
        raise UserError("the model has no binary layer, and the Bi-Mamba form is one of binary models")
    state = dict(dense_tensors(lm, leave_out=layers))
    for name, layer in layers.items():
        if isinstance(layer, Wrapper):
            raise UserError(f"{name} has {layer.beside}, and the Bi-Mamba form has none: convert to packed or latent")
        scale, shift = _scale_and_shift(name, layer)
        state |= {f"{name}.weight": _latent(layer), name + _SCALE: scale, name + _SHIFT: shift}
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


def _pattern(layer: str, readers: Mapping[str, Reader]) -> str:
    weight, scale, shift = (readers[layer + part]().shape for part in (".weight", _SCALE, _SHIFT))
    if len(weight) == 2 and scale == shift:
        shapes = {"column": (1, weight[1]), "row": (weight[0], 1)}
        if scale.numel() == 1 and weight.numel() > 1:
            return "single"
        for pattern, shape in shapes.items():
            if tuple(scale) == shape:
                return pattern
    raise UserError(
        f"{layer} has a weight {tuple(weight)}, wscale {tuple(scale)} and wbias {tuple(shift)}, and the Bi-Mamba form "
        "has both as (1, inputs), (outputs, 1) or one number"
    )


def _flat(read: Reader) -> Tensor:
    return read().reshape(-1)


def _latent(layer: QuantizedLinear) -> Tensor:
    if isinstance(layer, BinaryLinear):
        return layer.centred().detach()
    assert isinstance(layer, PackedLinear | PTBLinear)
    signs = layer.signs if isinstance(layer, PackedLinear) else layer.packed_signs()
    return ops.unpack_signs(signs, layer.in_features)


def _scale_and_shift(name: str, layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    held, scheme = layer.terms(), layer.kind()["scheme"]
    if held is None:
        raise UserError(f"{name} ({scheme}) holds more than one sign a weight, and the Bi-Mamba form one")
    terms = {key: term.detach().float() for key, term in held.items()}
    for side, shape in (("in", (1, -1)), ("out", (-1, 1))):
        if terms.keys() <= {f"{side}_scale", f"{side}_shift"}:
            scale = terms.get(f"{side}_scale", torch.ones(1))
            shift = terms.get(f"{side}_shift", torch.zeros_like(scale))
            if scale.numel() == shift.numel() == 1:
                return scale.reshape(1), shift.reshape(1)
            scale, shift = torch.broadcast_tensors(scale, shift)
            return scale.reshape(shape).contiguous(), shift.reshape(shape).contiguous()
    raise UserError(
        f"{name} ({scheme}) has {', '.join(terms)}, and the Bi-Mamba form has one scale and one shift by input, by "
        "output or for the whole matrix"
    )
