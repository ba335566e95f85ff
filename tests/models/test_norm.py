import pytest
import torch

from bimamba_lit.models.norm import GatedRMSNorm, RMSNorm


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm_is_its_formula():
    torch.manual_seed(0)
    norm, x = RMSNorm(12, eps=1e-2).double(), torch.randn(3, 5, 12, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight, 1e-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_gate_comes_before_the_norm_of_each_group(groups):
    torch.manual_seed(0)
    norm = GatedRMSNorm(12, groups, eps=1e-2).double()
    torch.nn.init.normal_(norm.weight)
    y, z = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    gated = y * z * torch.sigmoid(z)
    parts = zip(gated.chunk(groups, -1), norm.weight.chunk(groups), strict=True)
    expected = torch.cat([rms_norm(part, weight, 1e-2) for part, weight in parts], -1)
    torch.testing.assert_close(norm(y, z), expected, rtol=1e-12, atol=1e-12)


def test_in_half_precision_only_the_result_is_rounded():
    torch.manual_seed(0)
    x = torch.randn(4, 64) * 100
    exact = rms_norm(x, 1.0, 1e-5)
    norm = RMSNorm(64).bfloat16()
    assert torch.equal(norm(x), exact.bfloat16())

    y, z = x.bfloat16(), torch.randn(4, 64).bfloat16()
    exact = rms_norm(y.float() * torch.nn.functional.silu(z.float()), 1.0, 1e-5)
    assert torch.equal(GatedRMSNorm(64).bfloat16()(y, z), exact.bfloat16())
