"""A dense linear layer of one token in Triton."""

import pytest
import torch

from bimamba_lit.kernels.linear_rows.triton import linear_rows


@pytest.mark.parametrize("shape", [(1, 1), (13, 100), (8, 128)])
def test_rows_are_multiplied(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * shape[0], shape[1], generator=generator).half()[::2]
    x = torch.randn(shape[1], 2, generator=generator).half()[:, 0]
    y = linear_rows(x, weight)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, (weight.double() @ x.double()).half(), rtol=2e-3, atol=2e-3)
