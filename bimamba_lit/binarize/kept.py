"""A weight that is formed once, for as long as what it is formed of stays as it is."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Kept:
    """Keeps a tensor formed of others; a copy of it, as one that is pickled, has none."""

    def __init__(self) -> None:
        self._formed: tuple[tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        """Return what is copied and pickled: the place alone."""
        return Kept, ()

    def get(self, form: Callable[[], Tensor], tensors: Iterable[Tensor], beside: object) -> Tensor:
        """Return what ``form`` makes of the tensors and of what is beside them, made anew once one of these differs."""
        state = _state(tensors)
        if state is None:
            return form()
        state = (beside, *state)
        if self._formed is None or self._formed[0] != state:
            self._formed = state, form()
        return self._formed[1]

    def clear(self) -> None:
        """Let go of the tensor."""
        self._formed = None


def _state(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """Return what differs once the values of one of the tensors do, without reading them; None where nothing tells.

    It holds the tensors, so that none that comes later can have the place of one that is gone. Nothing tells of those
    made in inference mode or traced, as by ``torch.export`` and ``torch.func.vmap``.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        # A tensor is only ever compared with itself, as its id comes first.
        return tuple((id(t), t, t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)
    except RuntimeError:
        return None
