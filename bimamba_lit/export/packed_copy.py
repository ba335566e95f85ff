"""A packed copy of a model that costs no memory for what both share."""

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from bimamba_lit.binarize import BinaryLinear, pack_

Model = TypeVar("Model", bound=nn.Module)


def packed_copy(lm: Model) -> Model:
    """Return a copy of a model with every binary layer packed; all else is the model's own tensors, not copied.

    Args:
        lm: The model; it stays as it is, latent weights included. One without binary layers is copied as it is.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in chain(lm.parameters(), lm.buffers())}
    layers = [module for module in lm.modules() if isinstance(module, BinaryLinear)]
    # The weight that a layer keeps while it decodes would be copied too, dense.
    shared |= {id(layer._kept): None for layer in layers if layer._kept is not None}
    clone = copy.deepcopy(lm, shared)
    return pack_(clone) if layers else clone
