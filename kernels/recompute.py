"""Gradients by autograd of a function that is run again in the backward pass, so that only its inputs are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimamba_lit.kernels.autocast import without_autocast


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Any) -> Any:
        ctx.function = function
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.set_materialize_grads(False)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            other if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, other, wanted in zip(ctx.saved_tensors, ctx.others, needed, strict=True)
        ]
        some = next(tensor for tensor in ctx.saved_tensors if tensor is not None)
        # A backward pass inside an autocast block would otherwise round what the forward pass did not.
        with torch.enable_grad(), without_autocast(some):
            outputs = ctx.function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            used = [(out, g) for out, g in zip(outputs, gradients, strict=True) if g is not None and out.requires_grad]
            leaves = [value for value, wanted in zip(inputs, needed, strict=True) if wanted]
            found = iter(
                torch.autograd.grad([out for out, _ in used], leaves, [g for _, g in used], allow_unused=True)
                if used
                else [None] * len(leaves)
            )
        return None, *(next(found) if wanted else None for wanted in needed)


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return ``function(*inputs)``, whose intermediate values are computed again for the gradients.

    Args:
        function: Of tensors and other values; returns a tensor or a tuple of them, and draws no random numbers.
        inputs: Its arguments; floating-point tensors among them receive gradients.
    """
    return _Recompute.apply(function, *inputs)
