"""What every post-training scheme has in common: options, checks of its input, and a result that is what is stored."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from bimamba_lit.binarize.ptb.hessian import Calibrated, calibrated
from bimamba_lit.binarize.ptb.result import PTBResult
from bimamba_lit.errors import UserError


class PTBScheme(ABC):
    """A way to binarize or quantize one layer's weight after training; the base of every post-training scheme.

    Constructor arguments must be plain values kept under their own names: they are written into run folders and read
    back when a model is loaded.

    Attributes:
        needs_hessian: Whether ``fit`` takes the Hessian of the layer's inputs.
    """

    needs_hessian: ClassVar[bool] = True

    def fit(self, weight: Tensor, hessian: Tensor | None = None) -> PTBResult:
        """Fit one layer.

        Args:
            weight: ``(O, I)``, any float dtype.
            hessian: ``(I, I)``, ``(2 / N) X^T X`` over N calibration inputs X; only schemes that need none do without.

        Returns:
            The result, on the weight's device.

        Raises:
            UserError: If the weight or the Hessian is not finite, their shapes do not fit, an option does not divide
                the layer, or its scales leave the range of fp16.
        """
        _check_weight(weight)
        data = calibrated(weight, hessian) if self.needs_hessian else None
        parts = self.encode(data.weight if data else weight.detach().float(), data)
        decoded = self.decode(parts, *weight.shape)
        if not decoded.isfinite().all():
            raise UserError(f"a scale of {self!r} is beyond fp16's 65504: the layer's weights are too large")
        return PTBResult(decoded, parts, self.terms(parts), data.damping if data else None)

    @abstractmethod
    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the parts that ``weight`` ``(O, I)`` fp32 is stored as."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the weight ``(out_features, in_features)`` fp32 that stored parts stand for."""

    def terms(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the terms that go with ``parts["signs"]``, or None; see :attr:`PTBResult.terms`."""
        return None

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options().items())})"


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise UserError(f"a layer's weight is a float matrix (O, I), not {weight.dtype} of shape {tuple(weight.shape)}")
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise UserError(
            f"the weight holds {bad} values that are NaN or infinite: post-training schemes need finite ones"
        )


def group_of(size: int | None, features: int) -> int:
    """Return the inputs of a group: ``size``, or all ``features`` for None; one sentence if it does not divide them."""
    if size is None:
        return features
    if size < 1 or features % size:
        raise UserError(f"group_size={size} does not divide the layer's {features} inputs: take a divisor, or null")
    return size
