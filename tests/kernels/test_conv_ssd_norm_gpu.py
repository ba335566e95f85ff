"""A Mamba-2 mixer's middle as one op on a GPU: right, bit for bit its three ops at full shapes, one compiled graph."""

import pytest
import torch

from bimamba_lit import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the driver's words differ from machine to machine
]


def make(length, dtype, heads=48, groups=1, batch=2):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    inner = heads * 64
    channels = inner + 2 * groups * 128
    inputs = {
        "projected": normal(batch, length, inner + channels + heads).to(dtype),
        "conv_weight": normal(channels, 4) / 2,
        "conv_bias": normal(channels) / 2,
        "A": -normal(heads).abs(),
        "D": normal(heads),
        "dt_bias": normal(heads) - 3,
        "norm_weight": normal(inner),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def outputs_and_gradients(function, inputs, **options):
    y = function(**inputs, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    direction = torch.randn(y.shape, generator=generator, device="cuda").to(y.dtype)
    return {"y": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), direction), strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_naive(groups):
    inputs = make(300, torch.float32, heads=6, groups=groups)
    seq_idx = (torch.arange(300, device="cuda") // 70).expand(2, -1)
    options = {"seq_idx": seq_idx, "mask": (seq_idx > 0).long(), "groups": groups}
    found = outputs_and_gradients(ops.conv_ssd_norm, inputs, **options)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for name, right in outputs_and_gradients(ops.conv_ssd_norm, wide, backend="naive", **options).items():
        error = (found[name].double() - right).square().mean().sqrt()
        assert error <= 1e-4 * right.square().mean().sqrt(), f"{name}: {error}"


def test_it_is_the_three_ops_bit_for_bit():
    from bimamba_lit.kernels.conv_ssd_norm.triton import separate

    inputs = make(2048, torch.bfloat16, batch=8)
    found = outputs_and_gradients(ops.conv_ssd_norm, inputs)
    for name, right in outputs_and_gradients(separate, inputs).items():
        assert torch.equal(found[name], right), name


def test_one_compiled_graph():
    inputs = make(300, torch.bfloat16)
    right = outputs_and_gradients(ops.conv_ssd_norm, inputs)
    compiled = torch.compile(ops.conv_ssd_norm, fullgraph=True)
    for name, t in outputs_and_gradients(compiled, inputs).items():
        assert torch.equal(t, right[name]), name
