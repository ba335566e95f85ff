"""Signs as bits. O/I out/in features."""

import torch
from torch import Tensor

from bimamba_lit.kernels.signs import chunked, naive
from bimamba_lit.ops.arguments import check_dimensions, check_signs
from bimamba_lit.ops.backends import pick


def pack_signs(w: Tensor, *, backend: str = "auto") -> Tensor:
    """Pack the signs of a matrix to bits: bit i % 8 of byte i // 8 is 1 where w > 0, and padding bits are 0.

    Zero counts as -1, as in arXiv 2411.11843. Non-finite values are the caller's matter: NaN packs as -1.

    Args:
        w: Weights (O, I), any float dtype.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        Signs (O, ceil(I / 8)), uint8.

    Raises:
        ValueError: If the shape or the backend is wrong.
    """
    check_dimensions("w", w, "O I")
    return pick(backend, w, naive.pack_signs)(w)


def unpack_signs(
    signs: Tensor, in_features: int, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> Tensor:
    """Unpack what `pack_signs` packed.

    Args:
        signs: Packed signs (O, ceil(I / 8)), uint8.
        in_features: I, which the packed width alone does not tell.
        dtype: Of the result.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        Signs (O, I) of +1 and -1 in `dtype`.

    Raises:
        ValueError: If the shape, `in_features` or the backend is wrong.
        TypeError: If `signs` is not uint8.
    """
    check_signs(signs, in_features)
    return pick(backend, signs, naive.unpack_signs, chunked.unpack_signs)(signs, in_features, dtype)
