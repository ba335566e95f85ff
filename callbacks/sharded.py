"""Looking at layers whose parameters are spread over devices."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Layer = TypeVar("Layer", bound=nn.Module)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is spread over devices (FSDP2)."""
    return isinstance(tensor, DTensor)


def whole(layer: Layer) -> Layer:
    """Return ``layer`` with its own parameters gathered, to be read only; itself if they are not sharded.

    Every process of the run has to call it for the same layer at the same point.
    """
    parameters = layer._parameters
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return layer
    gathered = copy.copy(layer)
    gathered._parameters = {
        name: nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)
        if isinstance(parameter, DTensor)
        else parameter
        for name, parameter in parameters.items()
    }
    return gathered


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold every parameter of ``module`` whole on every device while the block lasts, as a forward pass by hand needs.

    Every process of the run has to enter at the same point. A module that is not sharded is left alone.
    """
    units = [child for child in module.modules() if isinstance(child, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
