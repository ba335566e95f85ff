"""The product with the binary weight of latent weights: the definition.

Legend: O out features, I in features, G groups of I / G contiguous inputs.
"""

from torch import Tensor

from bimamba_lit.kernels.autocast import product_dtype
from bimamba_lit.kernels.binary_weight.naive import binary_weight
from bimamba_lit.kernels.linear import linear


def latent_linear(
    x: Tensor,
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Multiply x (..., I) by the weight of the signs of `latent` (O, I), in autocast's dtype where it is on."""
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    return linear(x, binary_weight(latent, straight_through, *terms, product_dtype(x), reach), bias)
