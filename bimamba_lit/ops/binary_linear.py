"""The linear layer of packed signs. O/I out/in features, G groups of inputs."""

from torch import Tensor

from bimamba_lit.kernels.binary_linear import chunked, naive
from bimamba_lit.ops.arguments import check_float, check_signs, check_terms
from bimamba_lit.ops.backends import pick


def binary_linear(
    x: Tensor,
    signs: Tensor,
    in_features: int,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply by packed signs with scales and shifts, each term optional.

    ``y[o] = out_scale[o] * sum_g group_scale[o, g] * sum_{i in g} s[o, i] * in_scale[i] * x[i]
    + out_shift[o] * sum_i x[i] + sum_i in_shift[i] * x[i] + bias[o]``. Sums are in float32, or float64 for float64
    inputs; under autocast the product with the signs runs in autocast's dtype, as that of a dense layer does.

    Args:
        x: Inputs (..., I), any float dtype.
        signs: Packed signs (O, ceil(I / 8)), uint8, of `pack_signs`.
        in_features: I.
        in_scale: (I,) or (1,).
        out_scale: (O,) or (1,).
        group_scale: (O, G), for G contiguous groups of I / G inputs.
        in_shift: (I,) or (1,).
        out_shift: (O,) or (1,).
        bias: (O,) or (1,).
        activation_bits: 8 rounds ``in_scale * x`` to 255 equal steps from minus to plus its largest magnitude, token by
            token, before the product with the signs, which is then exact; the gradient passes the rounding unchanged.
            Steps are finer, each of 512 inputs, where a Hopper GPU multiplies one token or two of 8,192 inputs.
            ``None`` leaves it as it is.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (..., O) in x's dtype; `x` and every term receive gradients. With 8-bit activations the error of the product
        is at most ``max abs(in_scale x) / 254`` an input: 0.7% in root mean square for normally distributed inputs.

    Raises:
        ValueError: If a shape, `in_features`, `activation_bits` or the backend is wrong.
        TypeError: If `x` is not of a float dtype or `signs` not uint8.
    """
    check_float("x", x)
    check_signs(signs, in_features)
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., I) = (..., {in_features}).")
    if activation_bits not in (None, 8):
        raise ValueError(f"activation_bits is {activation_bits}, but must be None or 8.")
    check_terms(signs.shape[0], in_features, in_scale, out_scale, group_scale, in_shift, out_shift, bias)
    run = pick(backend, x, naive.binary_linear, chunked.binary_linear)
    return run(x, signs, in_features, in_scale, out_scale, group_scale, in_shift, out_shift, bias, activation_bits)
