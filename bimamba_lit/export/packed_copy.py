"""A packed copy of a model that costs no memory for what both share."""

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from bimamba_lit.binarize import LatentLinear, PTBLinear, packed_form

Model = TypeVar("Model", bound=nn.Module)


def packed_copy(lm: Model) -> Model:
    """Return a copy of a model with its binary layers packed; all else is the model's own tensors, not copied.

    Args:
        lm: The model; it stays as it is, latent weights included. Post-training results of more than one sign a weight
            and layers in full precision are copied as they are.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in chain(lm.parameters(), lm.buffers())}
    layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, LatentLinear | PTBLinear)}
    clone = copy.deepcopy(lm, shared)
    for name, layer in layers.items():
        if isinstance(layer, LatentLinear) or layer.terms() is not None:
            clone.set_submodule(name, packed_form(layer).train(layer.training))
    return clone
