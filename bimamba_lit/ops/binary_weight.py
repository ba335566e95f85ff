"""The weight of a binary layer in training. O/I out/in features, G groups of inputs."""

import torch
from torch import Tensor

from bimamba_lit.kernels.binary_weight import naive
from bimamba_lit.ops.arguments import check_dimensions, check_float, check_terms
from bimamba_lit.ops.backends import pick

STRAIGHT_THROUGH = ("identity", "clipped", "tanh", "bireal")


def binary_weight(
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reach: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Form the dense weight of a binary layer in training: signs of latent weights with scales and shifts.

    ``weight[o, i] = out_scale[o] * group_scale[o, g(i)] * s[o, i] * in_scale[i] + out_shift[o] + in_shift[i]``, with
    s = +1 where the latent weight is positive and -1 elsewhere: what `binary_linear` multiplies by.

    Args:
        latent: Latent weights (O, I), any float dtype.
        straight_through: What stands in for the sign's derivative at a latent weight v: with u = v / reach,
            ``"identity"`` 1, ``"clipped"`` 1 where abs(u) <= 1, else 0, ``"tanh"`` 1 - tanh(u)^2, ``"bireal"``
            max(0, 2 - 2 abs(u)), each over reach: the derivative to v of u, clip(u), tanh(u) or 2 u - u abs(u).
        in_scale: (I,) or (1,).
        out_scale: (O,) or (1,).
        group_scale: (O, G), for G contiguous groups of I / G inputs.
        in_shift: (I,) or (1,).
        out_shift: (O,) or (1,).
        dtype: Of the result, rounded once; by default that of `latent`.
        reach: (O,) or (1,), positive, no gradient; by default 1.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        weight (O, I); `latent` and every term receive gradients.

    Raises:
        ValueError: If a shape, `straight_through` or the backend is wrong.
        TypeError: If `latent` is not of a float dtype.
    """
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    check_latent(latent, straight_through, *terms, None, reach)
    run = pick(backend, latent, naive.binary_weight)
    return run(latent, straight_through, *terms, dtype, reach)


def check_latent(
    latent: Tensor,
    straight_through: str,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    group_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    bias: Tensor | None,
    reach: Tensor | None,
) -> None:
    """Refuse latent weights (O, I), or what goes with them, that make no binary weight."""
    check_dimensions("latent", latent, "O I")
    check_float("latent", latent)
    if straight_through not in STRAIGHT_THROUGH:
        raise ValueError(f"straight_through is {straight_through!r}, but must be one of {', '.join(STRAIGHT_THROUGH)}.")
    check_terms(latent.shape[0], latent.shape[1], in_scale, out_scale, group_scale, in_shift, out_shift, bias)
    if reach is not None and tuple(reach.shape) not in ((latent.shape[0],), (1,)):
        raise ValueError(f"reach has shape {tuple(reach.shape)}, but must be (O,) = {(latent.shape[0],)} or (1,).")
