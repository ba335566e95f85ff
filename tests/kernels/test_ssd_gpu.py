"""SSD in Triton on a GPU at full shapes: the definition in float64, every gradient, equal runs, graphs, long inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the driver's words differ from machine to machine
]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.005, torch.float16: 0.005}


def make(length, dtype, heads=8, width=64, groups=1, size=128, batch=2, gated=False):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    z = {"z": normal(batch, length, heads, width)} if gated else {}
    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads, dtype=torch.float32),
        "A": (-8 * torch.rand(heads, generator=generator, device="cuda")).requires_grad_(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(heads, width, dtype=torch.float32),
        "dt_bias": normal(heads, dtype=torch.float32),
        "initial_states": normal(batch, heads, width, size, dtype=torch.float32),
        **z,
    }


def directions(outputs):
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(t.shape, generator=generator, device="cuda").bfloat16().to(t.dtype) for t in outputs]


def run(inputs, backend, **options):
    outputs = ops.ssd(**inputs, dt_softplus=True, return_final_states=True, backend=backend, **options)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), directions(outputs))
    return dict(zip(("y", "states", *inputs), (*outputs, *gradients), strict=True))


def gradient_of_A_after_a_gate(inputs, seq_idx):
    """Return A's gradient of the definition where what the gate gives back is rounded to the inputs' dtype."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    z, dtype = wide.pop("z"), inputs["x"].dtype
    y, states = ops.ssd(**wide, dt_softplus=True, return_final_states=True, backend="naive", seq_idx=seq_idx)
    y.register_hook(lambda dy: dy.to(dtype).double())
    outputs = y * F.silu(z), states
    return torch.autograd.grad(outputs, wide["A"], directions(outputs))[0]


def assert_as_naive(inputs, **options):
    found = run(inputs, "auto", **options)
    right = run({name: t.detach().double().requires_grad_() for name, t in inputs.items()}, "naive", **options)
    if "z" in inputs:  # that one rounding may be more than the bound: few sums, which may cancel by chance
        right["A"] = gradient_of_A_after_a_gate(inputs, **options)
    for name, b in right.items():
        ratio = (found[name].double() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert ratio <= BOUNDS[inputs["x"].dtype], name


@pytest.mark.parametrize("length", [1, 100, 257, 2000])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_triton_is_the_definition(dtype, length):
    assert_as_naive(make(length, dtype))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gates_documents_groups_and_odd_widths(dtype):
    inputs = make(300, dtype, heads=9, width=40, groups=3, size=24, gated=True)
    seq_idx = (torch.arange(300, device="cuda") // 70).int().expand(2, -1)
    assert_as_naive(inputs, seq_idx=seq_idx)


def test_the_widest_heads_and_states():
    assert_as_naive(make(200, torch.bfloat16, heads=16, width=128, size=256))


def test_repeated_runs_are_equal():
    inputs = make(2000, torch.bfloat16, heads=48)
    right = run(inputs, "auto")
    torch.use_deterministic_algorithms(True)
    try:
        found = run(inputs, "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in found.items():
        assert torch.equal(t, right[name]), name


def test_compiles_without_a_graph_break_and_runs_in_a_cuda_graph():
    inputs = make(300, torch.bfloat16)

    def scan(**tensors):
        return ops.ssd(**tensors, dt_softplus=True)

    right = scan(**inputs)
    found = torch.compile(scan, fullgraph=True)(**inputs)
    assert torch.equal(found, right)
    detached = {name: t.detach() for name, t in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan(**detached)
    graph.replay()
    assert torch.equal(y, right)


def test_tensors_of_more_than_two_to_the_31_elements():
    heads, length = 64, (1 << 31) // (64 * 64) + 1000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.zeros(1, length, heads, 64, dtype=torch.bfloat16, device="cuda")
    inputs = make(400, torch.bfloat16, heads=heads, batch=1)
    tail = {name: inputs[name].detach() for name in ("x", "dt", "A", "B", "C")}
    x[:, -400:] = tail["x"]
    whole = {"A": tail["A"], "x": x}
    for name in ("dt", "B", "C"):
        whole[name] = torch.zeros(1, length, *tail[name].shape[2:], dtype=tail[name].dtype, device="cuda")
        whole[name][:, -400:] = tail[name]
    y = ops.ssd(**whole, dt_limit=(0.0, math.inf))
    right = ops.ssd(**tail, dt_limit=(0.0, math.inf))
    assert (y[:, -400:].float() - right.float()).square().mean().sqrt() <= 0.005 * right.float().square().mean().sqrt()
