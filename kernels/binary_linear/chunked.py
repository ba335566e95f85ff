"""The packed linear layer over a few output features at a time.

Unpacked at once, a weight matrix is written to memory and read back, thirty-two times the bytes of its signs. Here the
rows of a block are unpacked into cache and multiplied there. One token through a 2560 x 5120 layer on one core with
AVX-512 took 6 ms so, 99 ms by the definition and 2 ms with a dense float32 matrix.

Legend: O out features, I in features, G groups of I / G contiguous inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.binary_linear import naive
from bimamba_lit.kernels.signs.chunked import byte_table

BLOCK = 1 << 18  # unpacked weights of a block


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
    activation_bits: int | None = None,
) -> Tensor:
    """Compute what `naive.binary_linear` computes, which also serves while gradients are recorded."""
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *terms)):
        return naive.binary_linear(x, signs, in_features, *terms, activation_bits)
    wide = naive.accumulator(x)
    x_wide = x.to(wide)
    scaled = naive.scaled_inputs(x_wide, in_scale, activation_bits)
    table = byte_table(wide, x.device)
    rows = max(BLOCK // max(in_features, 1), 32)
    products = []
    for start in range(0, signs.shape[0], rows):
        block = slice(start, start + rows)
        weight = F.embedding(signs[block].int(), table).flatten(1)[:, :in_features]
        if group_scale is not None:
            weight = (weight.unflatten(1, (group_scale.shape[1], -1)) * group_scale[block].to(wide)[..., None]).flatten(
                1
            )
        products.append(F.linear(scaled, weight))
    y = naive.add_terms(torch.cat(products, dim=-1), x_wide, out_scale, in_shift, out_shift, bias)
    return y.to(x.dtype)
