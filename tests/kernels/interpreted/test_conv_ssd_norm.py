"""A Mamba-2 mixer's middle as one op in Triton: the definition, and bit for bit what its three ops give one by one."""

import pytest
import torch

from bimamba_lit import ops
from bimamba_lit.kernels.conv_ssd_norm.triton import separate


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(length, heads=2, width=8, groups=1, state=16, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inner = heads * width
    channels = inner + 2 * groups * state
    inputs = {
        "projected": normal(batch, length, inner + channels + heads).to(dtype),
        "conv_weight": normal(channels, 4),
        "conv_bias": normal(channels),
        "A": -normal(heads).abs(),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "norm_weight": normal(inner),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def documents(length, batch=1):
    seq_idx = torch.zeros(batch, length, dtype=torch.int64)
    for border in (2, 31, 33):
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def padding(length, batch=1):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :2] = mask[-1, -1:] = 0
    return mask


CASES = {
    "all": (66, {"groups": 2}, {"groups": 2, "eps": 1e-3, "seq_idx": documents(66), "mask": padding(66)}),
    "one token": (1, {}, {}),
    "plain": (40, {"batch": 2}, {}),
    "several chunks, groups": (70, {"heads": 4, "groups": 2}, {"groups": 2, "eps": 1e-3}),
    "documents": (36, {"batch": 2}, {"seq_idx": documents(36, 2)}),
    "padding": (20, {"batch": 2}, {"mask": padding(20, 2)}),
}
EVERY = [case if case in ("all", "one token") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def outputs_and_gradients(function, inputs, options):
    y = function(**inputs, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return {"y": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), direction), strict=True))


def by(backend):
    return lambda **arguments: ops.conv_ssd_norm(**arguments, backend=backend)


@pytest.mark.parametrize("case", EVERY)
def test_it_is_naive(case):
    length, sizes, options = CASES[case]
    inputs = make(length, **sizes)
    found = outputs_and_gradients(by("triton"), inputs, options)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for name, right in outputs_and_gradients(by("naive"), wide, options).items():
        error = (found[name].double() - right).square().mean().sqrt()
        assert error <= 1e-4 * right.square().mean().sqrt(), f"{name}: {error}"


@pytest.mark.parametrize("case", EVERY)
def test_it_is_the_three_ops_bit_for_bit(case):
    length, sizes, options = CASES[case]
    inputs = make(length, **sizes, dtype=torch.bfloat16)
    found = outputs_and_gradients(by("triton"), inputs, options)
    for name, right in outputs_and_gradients(separate, inputs, options).items():
        assert found[name].dtype == right.dtype
        assert torch.equal(found[name], right), name


def test_projected_features_may_be_a_view():
    inputs = make(3, batch=2)
    right = outputs_and_gradients(by("triton"), inputs, {})
    for order in ((1, 0, 2), (2, 1, 0)):
        turned = inputs["projected"].detach().permute(order).contiguous().permute(order)
        for name, t in outputs_and_gradients(by("triton"), inputs | {"projected": turned.requires_grad_()}, {}).items():
            assert torch.equal(t, right[name]), name


def test_what_has_no_kernel_takes_the_ops_one_by_one():
    inputs = {name: t.detach() for name, t in make(5, heads=1, width=136).items()}
    torch.testing.assert_close(by("triton")(**inputs), by("naive")(**inputs), rtol=1e-4, atol=1e-4)
    wide = {name: t.detach().double() for name, t in make(5).items()}
    torch.testing.assert_close(by("triton")(**wide), by("naive")(**wide))


def test_opcheck():
    inputs = (*make(4).values(), documents(4).int(), padding(4), 1, 1e-5)
    torch.library.opcheck(torch.ops.bimamba_lit.conv_ssd_norm.default, inputs)
    with torch.no_grad():
        out, *kept = torch.ops.bimamba_lit.conv_ssd_norm(*inputs)
    backward = torch.ops.bimamba_lit.conv_ssd_norm_backward.default
    torch.library.opcheck(backward, (out, *kept, *inputs), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break():
    inputs = make(6)
    options = {"seq_idx": documents(6), "mask": padding(6)}
    compiled = torch.compile(by("triton"), fullgraph=True, backend="aot_eager")
    right = outputs_and_gradients(by("triton"), inputs, options)
    for name, t in outputs_and_gradients(compiled, inputs, options).items():
        assert torch.equal(t, right[name]), name
