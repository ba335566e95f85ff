"""The one place where an op's backend is chosen; :mod:`bimamba_lit.ops` tells which is taken when."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

Op = TypeVar("Op", bound=Callable[..., Any])

BACKENDS = ("auto", "naive", "chunked", "triton")

_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Choose the forms that tensors on a GPU take, for tensors without values whose memory is to be counted."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def pick(backend: str, tensor: Tensor, naive: Op, chunked: Op | None = None, parallel: Op | None = None) -> Op:
    """Return the form of an op that `backend` and the device and dtype of `tensor` ask for, or raise ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
    if backend == "naive" or tensor.numel() == 0:  # other forms have no tiles or programs for nothing
        return naive
    # In float64 the Triton forms hold sums in float32, or are another form.
    on_gpu = tensor.is_cuda or _as_on_gpu
    if backend == "triton" or (backend == "auto" and on_gpu and tensor.dtype != torch.float64):
        module = naive.__module__.removesuffix("naive") + "triton"
        if has_triton_form(module, naive.__name__):
            if tensor.device.type == "cpu" and not _as_on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(
                    "backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 set before the start)."
                )
            kernel: Op = getattr(sys.modules[module], naive.__name__)
            return kernel
        if backend == "triton":
            raise ValueError(f"{naive.__name__} has no Triton form here; take backend='auto'.")
    if parallel is not None and (tensor.device.type != "cpu" or _as_on_gpu):
        return parallel
    return naive if chunked is None else chunked


def has_triton_form(module: str, name: str) -> bool:
    """Import an op's Triton form and say whether there is one."""
    return importable(module) and hasattr(import_module(module), name)


# As torch.compiler.assume_constant_result does, which imports Triton: torch.compile cannot trace an import by name.
has_triton_form._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def importable(module: str) -> bool:
    """Say whether there is such a module, and Triton for it."""
    return find_spec("triton") is not None and find_spec(module) is not None
