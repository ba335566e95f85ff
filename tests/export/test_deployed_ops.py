"""The deployed model's own ops, as a script runs them, against the package's."""

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops
from bimamba_lit.export import deployed_ops

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")


def random(*shape):
    return torch.randn(shape)


def assert_near(value, expected):
    assert (value - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("length", [1, 63, 130])
def test_ssd(length):
    torch.manual_seed(0)
    x, dt, a = random(2, length, 6, 4), F.softplus(random(2, length, 6)), -random(6).exp()
    b, c, state = random(2, length, 3, 5), random(2, length, 3, 5), random(2, 6, 4, 5)
    y, end = ops.ssd(x, dt, a, b, c, backend="naive", initial_states=state, return_final_states=True)
    stepped = state.clone()
    assert_near(torch.jit.script(deployed_ops.ssd)(x, dt, a, b, c, state), y)
    assert_near(state, end)
    step = torch.jit.script(deployed_ops.ssd_step)
    ys = [step(x[:, t], dt[:, t], a, b[:, t], c[:, t], stepped) for t in range(length)]
    assert_near(torch.stack(ys, 1), y)
    assert_near(stepped, end)


def test_ssd_forgets_and_does_not_overflow():
    x, dt, a = torch.ones(1, 70, 1, 1), torch.full((1, 70, 1), 1e4), -torch.ones(1)
    state = torch.full((1, 1, 1, 1), 1e30)
    y = torch.jit.script(deployed_ops.ssd)(x, dt, a, torch.ones(1, 70, 1, 1), torch.ones(1, 70, 1, 1), state)
    torch.testing.assert_close(y[:, 1:], torch.full((1, 69, 1, 1), 1e4))


@pytest.mark.parametrize("length", [1, 35])
def test_selective_scan(length):
    torch.manual_seed(0)
    u, delta, a = random(2, length, 6), F.softplus(random(2, length, 6)), -random(6, 4).exp()
    b, c, state = random(2, length, 4), random(2, length, 4), random(2, 6, 4)
    turned = (t.transpose(1, 2) for t in (u, delta))
    maps = (t.transpose(1, 2) for t in (b, c))
    y, end = ops.selective_scan(*turned, a, *maps, backend="naive", initial_states=state, return_last_state=True)
    y, stepped = y.transpose(1, 2), state.clone()
    assert_near(torch.jit.script(deployed_ops.selective_scan)(u, delta, a, b, c, state), y)
    assert_near(state, end)
    step = torch.jit.script(deployed_ops.selective_scan_step)
    assert_near(torch.stack([step(u[:, t], delta[:, t], a, b[:, t], c[:, t], stepped) for t in range(length)], 1), y)
    assert_near(stepped, end)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_conv(length):
    torch.manual_seed(0)
    x, past, weight, bias = random(2, length, 6), random(2, 3, 6), random(4, 6), random(6)
    y, end = ops.causal_conv1d(
        x.transpose(1, 2), weight.t(), bias, "silu", past.transpose(1, 2), return_final_states=True, backend="naive"
    )
    stepped = past.clone()
    assert_near(torch.jit.script(deployed_ops.causal_conv)(x, past, weight, bias), y.transpose(1, 2))
    assert_near(past, end.transpose(1, 2))
    step = torch.jit.script(deployed_ops.causal_conv_step)
    assert_near(torch.stack([step(x[:, t], stepped, weight, bias) for t in range(length)], 1), y.transpose(1, 2))
    assert_near(stepped, end.transpose(1, 2))


@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm(groups):
    torch.manual_seed(0)
    x, weight = random(2, 5, 12), random(12)
    assert_near(deployed_ops.rms_norm(x, weight, 1e-5, groups), ops.rms_norm(x, weight, eps=1e-5, groups=groups))
