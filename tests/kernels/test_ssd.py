"""SSD: naive against an explicit quadratic form, chunked against naive, gradients, documents, steps and extremes."""

import math

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops
from bimamba_lit.kernels.ssd import chunked, naive

LENGTHS = [1, 63, 100, 257, 400]


def make(length, heads=4, width=5, groups=2, size=3, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    rates = -2 * torch.rand(heads, generator=generator, dtype=torch.float64)
    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": rates.to(dtype).requires_grad_(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(heads, width),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads),
        "initial_states": normal(batch, heads, width, size),
    }


def documents_at(length, *borders, batch=2):
    """Return seq_idx (B, L) that changes at the borders; the second sequence has one document; values come again."""
    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def quadratic(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx=None, dt_limit=(0.0, math.inf)):
    """The attention form: y_i = sum_j C_i.B_j exp(sum_{j<k<=i} dt_k A) dt_j x_j, and the same for the states."""
    batch, length, heads, _ = x.shape
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    logs = dt * A
    reach = torch.ones(batch, length, length, dtype=torch.bool).tril()
    from_start = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch if seq_idx is not None else 0):
        for t in range(1, length):
            if seq_idx[b, t] != seq_idx[b, t - 1]:
                reach[b, t:, :t] = False
                from_start[b, t:] = False
    sums = torch.einsum("blh,il->bih", logs, torch.ones(length, length).tril().to(x))
    decay = torch.where(reach[..., None], sums[:, :, None] - sums[:, None], -math.inf).exp()
    scores = torch.einsum("bihn,bjhn,bijh,bjh->bijh", C, B, decay, dt)
    start_decay = sums.exp() * from_start[..., None]
    y = torch.einsum("bijh,bjhp->bihp", scores, x)
    y = y + torch.einsum("bihn,bhpn,bih->bihp", C, initial_states, start_decay)
    states = torch.einsum("bjh,bjh,bjhp,bjhn->bhpn", decay[:, -1], dt, x, B)
    states = states + initial_states * start_decay[:, -1, :, None, None]
    return (y + D * x) * F.silu(z), states


def outputs_and_gradients(function, inputs, **options):
    y, states = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in (y, states))
    return [y, states, *torch.autograd.grad(loss, list(inputs.values()))]


def run(function, inputs, **options):
    options = {"dt_softplus": True, "return_final_states": True, **options}
    return outputs_and_gradients(function, inputs, **options)


def rms_ratio(found, right):
    """Return the error's size relative to what is right, where what is right is not zero to all purposes."""
    return ((found.double() - right).square().mean().sqrt() / right.square().mean().sqrt().clamp_min(1e-15)).item()


@pytest.mark.parametrize("borders", [None, (1, 7, 12, 13)])
@pytest.mark.parametrize("groups", [1, 2])
def test_naive_is_the_quadratic_form(groups, borders):
    inputs = make(20, groups=groups)
    seq_idx = None if borders is None else documents_at(20, *borders)
    right = outputs_and_gradients(quadratic, inputs, seq_idx=seq_idx, dt_limit=(0.2, 1.5))
    found = run(naive.ssd, inputs, seq_idx=seq_idx, dt_limit=(0.2, 1.5))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seq_idx", [None, documents_at(5, 1, 4, batch=1)])
@pytest.mark.parametrize("function", [naive.ssd, chunked.ssd])
def test_gradients(function, seq_idx):
    inputs = make(5, heads=2, width=2, size=2, batch=1)

    def scan(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return function(**named, chunk_size=2, dt_softplus=True, seq_idx=seq_idx, return_final_states=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_naive(length, heads, groups):
    inputs = make(length, heads=heads, groups=groups, batch=1 if length > 300 else 2)
    for a, b in zip(run(chunked.ssd, inputs), run(naive.ssd, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("borders", [(64, 128), (63, 65, 127, 129), (1, 2, 3, 100, 140), (70, 80, 149)])
def test_documents_in_chunks_and_at_their_borders(borders):
    inputs, seq_idx = make(150), documents_at(150, *borders)
    found = run(chunked.ssd, inputs, seq_idx=seq_idx)
    for a, b in zip(found, run(naive.ssd, inputs, seq_idx=seq_idx), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    alone = {name: t[:, borders[-1] :] if t.ndim > 2 and name != "initial_states" else t for name, t in inputs.items()}
    alone["initial_states"] = torch.zeros_like(inputs["initial_states"])
    y, states = chunked.ssd(**alone, dt_softplus=True, return_final_states=True)
    torch.testing.assert_close(found[0][0, borders[-1] :], y[0])
    torch.testing.assert_close(found[1][0], states[0])


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    inputs = make(90)
    for a, b in zip(run(chunked.ssd, inputs, chunk_size=chunk_size), run(chunked.ssd, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [naive.ssd, chunked.ssd])
def test_only_what_is_given_counts(function):
    inputs = make(70)
    needed = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    zero = {"D": inputs["D"] * 0, "dt_bias": inputs["dt_bias"] * 0, "initial_states": inputs["initial_states"] * 0}
    torch.testing.assert_close(function(**needed), function(**needed, **zero))
    y = function(**needed, D=inputs["D"][:, 0])
    torch.testing.assert_close(y, function(**needed) + inputs["D"][:, :1] * inputs["x"])
    torch.testing.assert_close(function(**needed), function(**needed, return_final_states=True)[0])


def test_step_sizes_on_a_limit_have_a_gradient_and_those_beyond_have_none():
    dt = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5], requires_grad=True)
    size = naive.step_size(dt, None, False, (0.0, 1.0))
    size.sum().backward()
    assert size.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0] and dt.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_step_sizes_are_clamped_after_softplus():
    inputs = make(70)
    clamped = F.softplus(inputs["dt"] + inputs["dt_bias"]).clamp(0.3, 0.9)
    given = {**inputs, "dt": clamped, "dt_bias": torch.zeros_like(inputs["dt_bias"])}
    y = chunked.ssd(**inputs, dt_softplus=True, dt_limit=(0.3, 0.9))
    torch.testing.assert_close(y, chunked.ssd(**given))
    assert not torch.allclose(y, chunked.ssd(**inputs, dt_softplus=True))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_steps_are_the_scan(backend):
    inputs = {name: t.detach() for name, t in make(9).items()}
    y, states = ops.ssd(**inputs, dt_softplus=True, return_final_states=True)
    state = inputs["initial_states"].clone()
    constant = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            state = inputs["initial_states"].clone()
            for t in range(9):
                moving = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C", "z")}
                y_t, state = ops.ssd_step(state, **moving, **constant, dt_softplus=True, backend=backend)
                torch.testing.assert_close(y_t, y[:, t])
            torch.testing.assert_close(state, states)


def test_steps_have_gradients():
    inputs = make(1, heads=2, width=2, size=2)
    moving = tuple(inputs[name][:, 0] for name in ("x", "dt", "A", "B", "C") if name != "A")
    tensors = (inputs["initial_states"], moving[0], moving[1], inputs["A"], *moving[2:])
    assert torch.autograd.gradcheck(ops.ssd_step, tensors)


def test_views_are_read_as_they_are():
    inputs = make(70)
    right = run(chunked.ssd, inputs)
    views = {}
    for name, t in inputs.items():
        base = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        base[..., 1::2] = t.detach()
        views[name] = base[..., 1::2].requires_grad_()
    for a, b in zip(run(chunked.ssd, views), right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_precision(dtype, bound):
    inputs = make(300, batch=1, width=8, size=16, dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    found, right = run(chunked.ssd, inputs), run(naive.ssd, exact)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for name, a, b in zip(["y", "states", *inputs], found, right, strict=True):
        assert rms_ratio(a, b) <= bound, name


@pytest.mark.parametrize("gap", [1, 50])
def test_huge_steps_stay_finite_and_right(gap):
    inputs = make(130, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"][:, ::gap] = 1e4
        inputs["z"].zero_().add_(1.0)
        inputs["x"][:, ::gap] *= 1e-4
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for name, a, b in zip(["y", "states", *inputs], run(chunked.ssd, inputs), run(naive.ssd, exact), strict=True):
        assert torch.isfinite(a).all(), name
        assert rms_ratio(a, b) <= 1e-3, name


def test_autocast_changes_nothing():
    inputs = make(100, dtype=torch.float32)
    right = run(ops.ssd, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("chunked", "naive"):
            found = run(ops.ssd, inputs, backend=backend)
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_only_states_between_chunks_are_kept():
    inputs = make(512, heads=2, width=64, groups=1, size=8, batch=1, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chunked.ssd(**{name: t for name, t in inputs.items() if name != "z"})
    allowed = 512 // chunked.CHUNK * 2 * 64 * 8
    assert max(math.prod(shape) for shape in kept) <= max(allowed, inputs["x"].numel())
