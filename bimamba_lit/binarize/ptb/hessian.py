"""Getting a layer's Hessian ready: dead inputs, damping, the factor of its inverse (GPTQ, arXiv 2210.17323)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bimamba_lit.errors import UserError

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Shares of the mean diagonal to add, the first that lets the Hessian be inverted is taken; GPTQ's is 0.01."""


@dataclass(frozen=True)
class Calibrated:
    """A weight and the Hessian of its inputs, ready for propagating errors from column to column.

    Attributes:
        weight: ``(O, I)`` fp32, zero in the columns of inputs that were always zero.
        hessian: ``(I, I)`` fp32, damped.
        factor: ``(I, I)`` fp32, upper triangular ``U`` with ``U^T U`` the inverse of the damped Hessian.
        damping: Share of the mean diagonal that was added.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    damping: float


def calibrated(weight: Tensor, hessian: Tensor | None) -> Calibrated:
    """Check a Hessian ``(I, I)`` against a weight ``(O, I)``, damp it and factor its inverse.

    Raises:
        UserError: If there is no Hessian, its shape does not fit, it is not finite or zero, or no damping makes it
            positive.
    """
    features = weight.shape[1]
    if hessian is None:
        raise UserError("this scheme needs the Hessian of the layer's inputs, (2 / N) X^T X: calibrate, or pass one")
    if hessian.shape != (features, features):
        raise UserError(f"the Hessian of {features} inputs is ({features}, {features}), not {tuple(hessian.shape)}")
    if not hessian.isfinite().all():
        raise UserError("the Hessian holds NaN or infinity: the calibration inputs of this layer are not finite")
    weight = weight.detach().to(torch.float32, copy=True)
    double = hessian.detach().to(weight.device, torch.float64, copy=True)
    diagonal = double.diagonal()
    dead = diagonal == 0
    if dead.all():
        raise UserError("every calibration input of this layer was zero: calibrate on text that reaches it")
    diagonal[dead] = 1.0
    weight[:, dead] = 0.0
    mean = diagonal.mean().item()
    for damping in DAMPINGS:
        damped = double.clone()
        damped.diagonal().add_(damping * mean)
        factor = _inverse_factor(damped)
        if factor is not None:
            break
    else:
        raise UserError("the Hessian is not positive semidefinite: it must be X^T X of the layer's inputs")
    if damping > DAMPINGS[0]:
        warnings.warn(f"a near singular Hessian was damped by {damping} of its mean diagonal", stacklevel=3)
    return Calibrated(weight, damped.float(), factor.float(), damping)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """Return upper ``U`` with ``U^T U = hessian^-1``, or None where it is not positive definite.

    With rows and columns in reverse, ``H = R R^T`` for an upper ``R``; then ``U = R^-1``.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        return None
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return factor if factor.isfinite().all() else None


def proxy_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return ``tr((W - W^) H (W - W^)^T)`` as a share of ``tr(W H W^T)``: the layer's relative squared output error."""
    exact, error, metric = weight.double(), (weight - quantized).double(), hessian.double()
    return (((error @ metric) * error).sum() / ((exact @ metric) * exact).sum()).item()
