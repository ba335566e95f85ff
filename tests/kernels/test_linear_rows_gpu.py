"""A large dense layer of one token on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit.kernels import linear as module
from bimamba_lit.kernels.linear import linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_models_head(dtype, monkeypatch):
    weight = torch.randn(50288, 2560, device="cuda").to(dtype)
    x, bias = torch.randn(1, 1, 2560, device="cuda").to(dtype), torch.randn(50288, device="cuda").to(dtype)
    calls, rows = [], module._rows
    monkeypatch.setattr(module, "_rows", lambda *given: calls.append(1) or rows(*given))
    right = F.linear(x.double(), weight.double(), bias.double())
    y = linear(x, weight, bias)
    assert calls and y.shape == right.shape and float((y.double() - right).norm() / right.norm()) <= 0.004
    assert torch.equal(y, linear(x, weight, bias))
    linear(x.float(), weight.float()), linear(x.expand(2, 1, -1), weight)
    assert len(calls) == 2
