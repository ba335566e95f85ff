"""Layers to fit: a weight (O, I) and the Hessian (I, I) of its inputs."""

import pytest
import torch


def hessian(inputs):
    return 2 / len(inputs) * inputs.T @ inputs


def correlated(rows, columns, seed=0):
    """A random weight, inputs of decaying spectrum."""
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=noise) / columns**0.5
    mixing = torch.logspace(0, -2, columns)[:, None] * mixing + 0.05 * torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=noise) @ mixing
    return 0.02 * torch.randn(rows, columns, generator=noise), hessian(inputs)


def trained(rows, columns, seed=0):
    """A weight fitted by gradient descent to a gated teacher, on inputs with a few large channels."""
    torch.manual_seed(seed)
    channels = torch.ones(columns)
    channels[:: columns // 8] = 6.0
    inputs = torch.randn(4 * columns, columns) @ (torch.randn(columns, columns) / columns**0.5) * channels
    wanted = torch.tanh(inputs @ torch.randn(columns, rows) / columns**0.5)
    layer = torch.nn.Linear(columns, rows, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(inputs) - wanted).square().mean().backward()
        optimizer.step()
    return layer.weight.detach(), hessian(inputs)


@pytest.fixture
def layer():
    """Makes a layer: ``layer(kind, rows, columns, seed)``."""
    return lambda kind, rows, columns, seed=0: {"correlated": correlated, "trained": trained}[kind](rows, columns, seed)
