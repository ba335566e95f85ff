"""Autocast on any device; on one that has none, as ``meta``, it is off, where torch's own functions raise."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast multiplies ``x`` in; None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if _is_on(x) else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off on the device of ``x``, for an op that holds its sums in float32 whatever it is called in."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x) else nullcontext()


def _is_on(x: Tensor) -> bool:
    device = x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# As torch.compiler.assume_constant_result does: torch.compile of torch 2.11 cannot trace the question.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
