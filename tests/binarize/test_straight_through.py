"""The sign and the gradients that stand in for its own."""

import pytest
import torch

from bimamba_lit.binarize import straight_through_sign
from bimamba_lit.errors import UserError

X = torch.tensor([-1e8, -2.0, -1.0, -0.6, -0.0, 0.0, 1e-30, 0.3, 1.0, 1.5, 1e8])
SLOPES = {
    "identity": torch.ones_like(X),
    "clipped": torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]),
    "tanh": 1 / torch.cosh(X.double().clamp(-300, 300)).square().float(),
    "bireal": torch.tensor([0.0, 0, 0, 0.8, 2, 2, 2, 1.4, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", SLOPES)
def test_forward_is_the_sign_with_zero_as_minus_one(kind):
    expected = torch.tensor([-1.0, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1])
    assert torch.equal(straight_through_sign(X, kind), expected)


@pytest.mark.parametrize("kind", SLOPES)
def test_backward_is_the_formula(kind):
    x = X.clone().requires_grad_()
    upstream = torch.randn(len(X))
    straight_through_sign(x, kind).backward(upstream)
    torch.testing.assert_close(x.grad, upstream * SLOPES[kind])


@pytest.mark.parametrize("kind", SLOPES)
def test_it_is_taken_in_units_of_the_reach(kind):
    reach, upstream = torch.tensor([[0.5], [0.02]]), torch.randn(2, len(X))
    x = (reach * X).requires_grad_()
    straight_through_sign(x, kind, reach).backward(upstream)
    torch.testing.assert_close(x.grad, upstream * SLOPES[kind] / reach)


@pytest.mark.parametrize("kind", ["clipped", "tanh", "bireal"])
@pytest.mark.parametrize("reach", [1.0, 0.02])
def test_a_gradient_adds_up_to_the_height_of_the_step(kind, reach):
    x = torch.linspace(-20 * reach, 20 * reach, 400_001, dtype=torch.float64).requires_grad_()
    straight_through_sign(x, kind, torch.tensor(reach, dtype=torch.float64)).sum().backward()
    assert float(torch.trapezoid(x.grad, x.detach())) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(5, dtype=dtype, requires_grad=True)
    y = straight_through_sign(x, "tanh")
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype


def test_another_gradient_is_refused():
    with pytest.raises(UserError, match="straight_through is 'sigmoid', and must be one of identity, clipped, tanh"):
        straight_through_sign(X, "sigmoid")
