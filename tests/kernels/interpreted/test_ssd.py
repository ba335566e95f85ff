"""SSD's Triton kernels in the interpreter against the definition: outputs, every gradient, views, documents, poison."""

import math

import pytest
import torch

from bimamba_lit import ops

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.005, torch.float16: 0.005}


def make(length, heads=3, width=16, groups=1, size=16, batch=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": (-torch.rand(heads, generator=generator)).requires_grad_(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(heads, width, dtype=torch.float32),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads, dtype=torch.float32),
        "initial_states": normal(batch, heads, width, size, dtype=torch.float32),
    }


def documents_at(length, *borders, batch=1):
    """Return seq_idx (B, L) that changes at the borders; values come again."""
    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def run(inputs, backend, **options):
    options = {"dt_softplus": True, "return_final_states": True, **options}
    outputs = ops.ssd(**inputs, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in outputs]
    named = dict(zip(("y", "states"), outputs, strict=True))
    return named | dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), directions), strict=True))


def exact(inputs):
    return {name: t.detach().float().requires_grad_() for name, t in inputs.items()}


def assert_as_naive(inputs, bound=None, **options):
    bound = bound or BOUNDS[inputs["x"].dtype]
    found, right = run(inputs, "triton", **options), run(exact(inputs), "naive", **options)
    wrong = {}
    for name, a in found.items():
        a, b = a.detach().double(), right[name].detach().double()
        ratio = (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12)
        if not ratio <= bound:
            wrong[name] = ratio.item()
    assert not wrong


@pytest.mark.parametrize("length", [1, 63, 100, 257])
def test_triton_is_naive(length):
    assert_as_naive(make(length, batch=1 if length > 100 else 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 70])
def test_half_precision(length, dtype):
    inputs = make(length, heads=8, dtype=dtype)
    assert_as_naive({name: t for name, t in inputs.items() if name != "z"})
    y, states = ops.ssd(**inputs, return_final_states=True, backend="triton")
    assert (y.dtype, states.dtype) == (dtype, torch.float32)


def test_gradients_of_decays_in_bfloat16_over_draws():
    """C B^T rounded to bfloat16 would be the largest error of all three, and that of dt 0.0015 and more."""
    bounds = {"dt": 0.001, "A": 0.003, "dt_bias": 0.003}
    seq_idx = documents_at(130, 70)
    for seed in range(3):
        inputs = make(130, heads=6, groups=2, dtype=torch.bfloat16, seed=seed)
        inputs["dt"] = inputs["dt"].detach().float().requires_grad_()
        del inputs["z"]
        found = run(inputs, "triton", seq_idx=seq_idx)
        wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
        right = run(wide, "naive", seq_idx=seq_idx)
        for name, bound in bounds.items():
            ratio = (found[name].double() - right[name]).norm() / right[name].norm()
            assert ratio <= bound, (seed, name)


@pytest.mark.parametrize(("heads", "groups", "width", "size"), [(5, 1, 5, 24), (6, 3, 33, 3)])
def test_odd_widths_and_groups(heads, groups, width, size):
    assert_as_naive(make(40, heads, width, groups, size))


@pytest.mark.parametrize("borders", [(32, 64), (15, 17, 31, 33, 63), (1, 2, 3, 50, 69)])
def test_documents(borders):
    assert_as_naive(make(70), seq_idx=documents_at(70, *borders))


def test_documents_where_the_state_stays_in_registers():
    inputs = make(150, dtype=torch.float16)
    assert_as_naive({name: t for name, t in inputs.items() if name != "z"}, seq_idx=documents_at(150, 15, 64, 130))


def test_only_what_is_given_counts():
    inputs = make(40)
    needed = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    assert_as_naive(needed)
    assert_as_naive(needed | {"D": inputs["D"][:, 0].detach().requires_grad_()}, dt_limit=(0.3, 0.9))
    y = ops.ssd(**needed, dt_softplus=True, backend="triton")
    gradients = torch.autograd.grad(y.sum(), list(needed.values()))
    right = torch.autograd.grad(ops.ssd(**needed, dt_softplus=True, backend="naive").sum(), list(needed.values()))
    for a, b in zip(gradients, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_final_states_alone_have_gradients():
    inputs = make(40)
    del inputs["z"], inputs["D"]

    def gradients(backend):
        _, states = ops.ssd(**inputs, dt_softplus=True, return_final_states=True, backend=backend)
        return torch.autograd.grad(states.square().sum(), [inputs["x"], inputs["initial_states"]])

    for a, b in zip(gradients("triton"), gradients("naive"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_views_are_read_as_they_are():
    """Tokens may lie close together, features apart, and what lies between them may be anything."""
    inputs = make(70)
    views = {}
    for name, t in inputs.items():
        base = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
        base[..., 1::2] = t.detach()
        views[name] = base[..., 1::2].requires_grad_()
    views["x"] = inputs["x"].detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    assert_as_naive(views)


def test_parts_of_a_long_projection_are_not_copied():
    from bimamba_lit.kernels.ssd.triton_forward import readable

    parts = torch.empty(8, 2048, 10576, device="meta").split([5120, 5376, 80], dim=-1)
    assert all(readable(part) is part for part in parts)


def test_steps_of_zero_and_huge_ones():
    inputs = make(70)
    with torch.no_grad():
        inputs["dt"][:, ::3] = -1e4
        inputs["dt"][:, ::13] = 1e4
        inputs["x"][:, ::13] *= 1e-4
    assert_as_naive(inputs, bound=1e-3)


def test_steps_of_exactly_zero_have_gradients():
    inputs = make(40)
    with torch.no_grad():
        inputs["dt"].abs_()[:, ::3] = 0.0
    del inputs["dt_bias"]
    assert_as_naive(inputs, dt_softplus=False)


def test_nan_is_not_hidden():
    inputs = {name: t.detach() for name, t in make(40).items()}
    inputs["dt"][0, 20, 1] = math.nan
    y = ops.ssd(**inputs, dt_softplus=True, backend="triton")
    assert y[0, 20:, 1].isnan().all() and y[0, :, 0].isfinite().all()


def test_outputs_do_not_depend_on_what_memory_held(monkeypatch):
    inputs = make(45)
    right = run(inputs, "triton")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in found.items():
        assert torch.equal(t, right[name]), name


@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everything):
    inputs = make(20, heads=2)
    documents = documents_at(20, 7) if everything else None
    if not everything:
        inputs |= dict.fromkeys(("D", "z", "dt_bias", "initial_states"))
    torch.library.opcheck(torch.ops.bimamba.ssd.default, (*inputs.values(), documents, True, 0.0, math.inf))


def test_compiles_without_a_graph_break():
    inputs = make(20, heads=2)

    def scan(**tensors):
        return ops.ssd(**tensors, dt_softplus=True, backend="triton") * 2

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**inputs).sum(), list(inputs.values()))
    for a, b in zip(found, torch.autograd.grad(scan(**inputs).sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(a, b)


def test_what_has_no_kernel_takes_the_plain_form():
    inputs = {name: t.detach().double() for name, t in make(10).items()}
    torch.testing.assert_close(ops.ssd(**inputs, backend="triton"), ops.ssd(**inputs, backend="naive"))
    wide = {name: t.detach() for name, t in make(3, heads=1, width=136).items()}
    torch.testing.assert_close(ops.ssd(**wide, backend="triton"), ops.ssd(**wide, backend="naive"))
