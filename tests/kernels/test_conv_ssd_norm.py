"""A Mamba-2 mixer's middle in plain PyTorch against its definition: outputs, every gradient, documents, padding."""

import pytest
import torch

from bimamba_lit.kernels.conv_ssd_norm import chunked, naive, parallel


def make(length, heads=4, width=5, groups=2, state=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner = heads * width
    channels = inner + 2 * groups * state
    inputs = {
        "projected": normal(2, length, inner + channels + heads),
        "conv_weight": normal(channels, 4),
        "conv_bias": normal(channels),
        "A": -normal(heads).abs(),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "norm_weight": normal(inner),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def outputs_and_gradients(function, inputs, **options):
    y = function(**inputs, groups=2, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, list(inputs.values()), direction)]


@pytest.mark.parametrize("form", [chunked, parallel])
@pytest.mark.parametrize("length", [1, 70])
def test_it_is_naive(form, length):
    inputs = make(length)
    seq_idx = (torch.arange(length) // 33).expand(2, -1)
    mask = (torch.arange(length) >= torch.tensor([0, 7])[:, None]).long()
    for options in ({}, {"seq_idx": seq_idx}, {"mask": mask, "eps": 1e-3}):
        found = outputs_and_gradients(form.conv_ssd_norm, inputs, **options)
        for a, b in zip(found, outputs_and_gradients(naive.conv_ssd_norm, inputs, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
