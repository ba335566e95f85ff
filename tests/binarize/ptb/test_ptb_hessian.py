"""Readying a Hessian, and input that cannot be fitted."""

import pytest
import torch

from bimamba_lit.binarize import ptb
from bimamba_lit.binarize.ptb.hessian import calibrated
from bimamba_lit.errors import UserError

CALIBRATED = pytest.mark.parametrize(
    "scheme", [ptb.GPTQ(2, None), ptb.PBLLM(), ptb.BiLLM(), ptb.ARB(), ptb.ARBX(), ptb.ARBRC()], ids=repr
)


def test_the_factor_is_that_of_the_damped_inverse(layer):
    weight, hessian = layer("correlated", 4, 96)
    hessian[7], hessian[:, 7] = 0.0, 0.0
    data = calibrated(weight, hessian)
    expected = hessian.double().clone()
    expected[7, 7] = 1.0
    expected += 0.01 * expected.diagonal().mean() * torch.eye(96)
    assert torch.equal(data.factor, data.factor.triu()) and (data.factor.diagonal() > 0).all()
    torch.testing.assert_close(data.hessian, expected.float())
    inverse = data.factor.double().T @ data.factor.double()
    torch.testing.assert_close(inverse @ expected, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-4)
    assert data.damping == 0.01 and not data.weight[:, 7].any()


@CALIBRATED
def test_too_few_inputs_for_the_rank_are_damped(scheme):
    inputs = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    result = scheme.fit(weight, inputs.T @ inputs)
    assert result.damping == 0.01 and result.weight.isfinite().all()


@CALIBRATED
def test_a_hessian_that_is_not_quite_positive_is_damped_more_and_said_so(scheme):
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05
    with pytest.warns(UserWarning, match="damped by 0.1 of its mean diagonal"):
        result = scheme.fit(torch.randn(6, 64), hessian)
    assert result.damping == 0.1 and result.weight.isfinite().all()


def broken(value):
    hessian = torch.eye(64)
    hessian[3, 3] = value
    return hessian


@CALIBRATED
@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (None, "needs the Hessian of the layer's inputs"),
        (torch.eye(63), r"the Hessian of 64 inputs is \(64, 64\), not \(63, 63\)"),
        (broken(float("nan")), "the Hessian holds NaN or infinity"),
        (broken(float("inf")), "the Hessian holds NaN or infinity"),
        (broken(-1e4), "not positive semidefinite"),
        (torch.zeros(64, 64), "every calibration input of this layer was zero"),
    ],
)
def test_hessians_that_cannot_be(scheme, hessian, message):
    with pytest.raises(UserError, match=message):
        scheme.fit(torch.randn(6, 64), hessian)


@pytest.mark.parametrize("scheme", [ptb.Sign(), ptb.ScaledSign(), ptb.GPTQ(), ptb.ARBRC()], ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(scheme, value):
    weight = torch.randn(6, 128)
    weight[2, 3] = value
    with pytest.raises(UserError, match="the weight holds 1 values that are NaN or infinite"):
        scheme.fit(weight, torch.eye(128))


@pytest.mark.parametrize("scheme", [ptb.ScaledSign(), ptb.GPTQ(), ptb.PBLLM(), ptb.BiLLM(), ptb.ARBX()], ids=repr)
def test_weights_beyond_what_a_stored_scale_holds(scheme):
    with pytest.raises(UserError, match="beyond fp16's 65504"):
        scheme.fit(1e7 * torch.randn(6, 128), torch.eye(128))


@pytest.mark.parametrize("weight", [torch.ones(6), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int64)])
def test_weights_that_are_no_matrix(weight):
    with pytest.raises(UserError, match=r"a layer's weight is a float matrix \(O, I\)"):
        ptb.Sign().fit(weight)


def test_a_metric_that_billm_has_not():
    with pytest.raises(UserError, match="metric is 'paper' or 'released', not 'hessian'"):
        ptb.BiLLM("hessian")


def test_proxy_error_is_the_share_of_squared_output_lost():
    weight, quantized, inputs = torch.randn(5, 8), torch.randn(5, 8), torch.randn(30, 8)
    lost = (inputs @ (weight - quantized).T).square().sum() / (inputs @ weight.T).square().sum()
    assert ptb.proxy_error(weight, quantized, inputs.T @ inputs) == pytest.approx(lost.item(), rel=1e-5)
