"""``y = W x`` that is fast for a few tokens."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4  # tokens on a CPU; for more, PyTorch's product of matrices is as fast
# Elements of a weight of wide and of narrower rows: with fewer, a product a row costs more than other cores gain.
_WIDE, _WORTHWHILE = 512, (1 << 19, 1 << 20)
_LARGE = 1 << 26  # elements of a weight, as a model's head has, that a GPU reads from memory for a token
_HAS_TRITON = find_spec("triton") is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., I) by the weight (O, I) and add the bias (O,): (..., O), as ``F.linear`` does.

    Two cases without gradients take another form. At most four tokens in fp32 on a CPU: a decoded token reads every
    weight once and does little else, and the product that PyTorch calls there runs on one core and jumps between rows;
    a batch of small products, one a row, runs on all cores and reads memory in order. One token in 16 bits on a GPU,
    for a large weight, where reading whole rows at once comes closer to the memory's speed than cuBLAS.
    """
    rows, width = weight.shape
    few = x.shape[-1:] == (width,) and 0 < x.numel() <= FEW * width
    if not few or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if _reads_rows(x, weight):
        y = _rows(x.reshape(width), weight).view(*x.shape[:-1], rows)
    elif _applies(x, weight):
        tokens = x.reshape(1, -1, width)
        # As a transposed row, so that the product is one of MKL's: it has none for a column.
        y = torch.bmm(tokens.expand(rows, -1, -1), weight.unsqueeze(1).mT).squeeze(2).t().contiguous()
        y = y.view(*x.shape[:-1], rows)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


def _applies(x: Tensor, weight: Tensor) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32
    large = weight.numel() >= _WORTHWHILE[weight.shape[1] < _WIDE]
    return fp32 and weight.is_cpu and large and not torch.is_autocast_enabled("cpu")


def _reads_rows(x: Tensor, weight: Tensor) -> bool:
    rows, width = weight.shape
    alike = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    large = alike and weight.is_cuda and x.numel() == width and weight.numel() >= _LARGE and width <= 8192
    return large and _HAS_TRITON and weight.stride(1) == 1


@torch.library.custom_op("bimamba_lit::linear_rows", mutates_args=())
def _rows(x: Tensor, weight: Tensor) -> Tensor:
    from bimamba_lit.kernels.linear_rows.triton import linear_rows

    return linear_rows(x, weight)


@_rows.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0])
