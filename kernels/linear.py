"""``y = W x`` that is fast for a few tokens on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4  # tokens; for more, PyTorch's product of matrices is as fast
_WORTHWHILE = 1 << 17  # elements of a weight; with fewer, starting the other cores costs more than they gain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., I) by the weight (O, I) and add the bias (O,): (..., O), as ``F.linear`` does.

    At most four tokens in fp32 on a CPU without gradients take another form. A decoded token reads every weight once
    and does little else. The product that PyTorch calls there runs on one core and jumps between rows; a batch of small
    products, one a row, runs on all cores and reads memory in order.
    """
    rows, width = weight.shape
    if x.numel() > FEW * width or x.numel() == 0 or torch.is_grad_enabled() or not _applies(x, weight):
        return F.linear(x, weight, bias)
    tokens = x.reshape(1, -1, width)
    # As a transposed row, so that the product is one of MKL's: it has none for a column.
    y = torch.bmm(tokens.expand(rows, -1, -1), weight.unsqueeze(1).mT).squeeze(2).t().contiguous()
    y = y.view(*x.shape[:-1], rows)
    return y if bias is None else y + bias


def _applies(x: Tensor, weight: Tensor) -> bool:
    wide = x.dtype == weight.dtype == torch.float32
    return wide and weight.is_cpu and weight.numel() >= _WORTHWHILE and not torch.is_autocast_enabled("cpu")
