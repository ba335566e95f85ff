"""Selective scan: naive against an explicit sum, chunked against naive, gradients, documents, steps and extremes."""

import math

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops
from bimamba_lit.kernels.selective_scan import chunked, naive

LENGTHS = [1, 63, 100, 257]


def make(length, channels=6, size=3, groups=None, batch=2, dtype=torch.float64, seed=0):
    """Return inputs; `groups` is None for maps (B, N, L), else their number in B, while C has one group."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    rates = -2 * torch.rand(channels, size, generator=generator, dtype=torch.float64)
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": rates.to(dtype).requires_grad_(),
        "B": normal(batch, *(() if groups is None else (groups,)), size, length),
        "C": normal(batch, *(() if groups is None else (1,)), size, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels),
        "initial_states": normal(batch, channels, size),
    }


def documents_at(length, *borders, batch=2):
    """Return seq_idx (B, L) that changes at the borders; the second sequence has one document; values come again."""
    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def explicit(u, delta, A, B, C, D, z, delta_bias, initial_states, seq_idx=None):
    """Every state as a sum over the past: h_i = sum_j exp(A sum_{j<k<=i} delta_k) delta_j u_j B_j, and the start."""
    batch, channels, length = u.shape
    B, C = (t if t.ndim == 4 else t[:, None] for t in (B, C))
    B, C = (t.repeat_interleave(channels // t.shape[1], dim=1) for t in (B, C))
    delta = F.softplus(delta + delta_bias[:, None])
    reach = torch.ones(batch, length, length, dtype=torch.bool).tril()
    from_start = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch if seq_idx is not None else 0):
        for t in range(1, length):
            if seq_idx[b, t] != seq_idx[b, t - 1]:
                reach[b, t:, :t] = False
                from_start[b, t:] = False
    sums = delta.cumsum(-1)
    logs = torch.einsum("dn,bdij->bijdn", A, sums[..., None] - sums[..., None, :])
    decay = torch.where(reach[..., None, None], logs, -math.inf).exp()
    states = torch.einsum("bijdn,bdj,bdj,bdnj->bidn", decay, delta, u, B)
    start = torch.einsum("dn,bdi->bidn", A, sums).exp() * from_start[..., None, None]
    states = states + start * initial_states[:, None]
    y = torch.einsum("bidn,bdni->bdi", states, C) + D[:, None] * u
    return y * F.silu(z), states[:, -1]


def outputs_and_gradients(function, inputs, **options):
    y, states = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in (y, states)]
    loss = sum((t.double() * weight).sum() for t, weight in zip((y, states), weights, strict=True))
    return [y, states, *torch.autograd.grad(loss, list(inputs.values()))]


def run(function, inputs, **options):
    return outputs_and_gradients(function, inputs, delta_softplus=True, return_last_state=True, **options)


def rms_ratio(found, right):
    """Return the error's size relative to what is right, where what is right is not zero to all purposes."""
    return ((found.double() - right).square().mean().sqrt() / right.square().mean().sqrt().clamp_min(1e-15)).item()


def assert_same(found, right, inputs, **tolerance):
    for name, a, b in zip(["y", "states", *inputs], found, right, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("borders", [None, (1, 7, 12, 13)])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_naive_is_the_explicit_sum(groups, borders):
    inputs = make(20, groups=groups)
    seq_idx = None if borders is None else documents_at(20, *borders)
    right = outputs_and_gradients(explicit, inputs, seq_idx=seq_idx)
    assert_same(run(naive.selective_scan, inputs, seq_idx=seq_idx), right, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seq_idx", [None, documents_at(5, 1, 4, batch=1)])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("function", [naive.selective_scan, chunked.selective_scan])
def test_gradients(function, groups, seq_idx):
    inputs = make(5, channels=2, size=2, groups=groups, batch=1)

    def scan(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return function(**named, delta_softplus=True, seq_idx=seq_idx, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_naive(length, groups):
    inputs = make(length, groups=groups)
    right = run(naive.selective_scan, inputs)
    assert_same(run(chunked.selective_scan, inputs), right, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_the_chunk_changes_nothing(chunk, groups, monkeypatch):
    inputs, seq_idx = make(90, groups=groups), documents_at(90, 1, 7, 8, 40)
    right = run(naive.selective_scan, inputs, seq_idx=seq_idx)
    monkeypatch.setattr(chunked, "SHORTEST_CHUNK", chunk)
    monkeypatch.setattr(chunked, "LONGEST_CHUNK", chunk)
    assert_same(run(chunked.selective_scan, inputs, seq_idx=seq_idx), right, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("borders", [(64, 128), (63, 65, 127, 129), (1, 2, 3, 100, 140), (70, 80, 149)])
def test_documents_in_chunks_and_at_their_borders(borders, groups):
    inputs, seq_idx = make(150, groups=groups), documents_at(150, *borders)
    found = run(chunked.selective_scan, inputs, seq_idx=seq_idx)
    assert_same(found, run(naive.selective_scan, inputs, seq_idx=seq_idx), inputs, rtol=1e-9, atol=1e-9)
    alone = {name: t[..., borders[-1] :] if t.shape[-1] == 150 else t for name, t in inputs.items()}
    alone["initial_states"] = torch.zeros_like(inputs["initial_states"])
    y, states = chunked.selective_scan(**alone, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(found[0][0, :, borders[-1] :], y[0])
    torch.testing.assert_close(found[1][0], states[0])


@pytest.mark.parametrize("function", [naive.selective_scan, chunked.selective_scan])
def test_only_what_is_given_counts(function):
    inputs = make(70)
    needed = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    needed["delta"] = needed["delta"].abs()
    zero = {name: inputs[name] * 0 for name in ("D", "delta_bias", "initial_states")}
    torch.testing.assert_close(function(**needed), function(**needed, **zero))
    torch.testing.assert_close(function(**needed), function(**needed, return_last_state=True)[0])
    y = function(**needed, D=inputs["D"])
    torch.testing.assert_close(y, function(**needed) + inputs["D"][:, None] * inputs["u"])


@pytest.mark.parametrize("kept", ["y", "states"])
def test_one_output_may_go_unused(kept):
    inputs = make(70)
    grads = []
    for function in (naive.selective_scan, chunked.selective_scan):
        y, states = function(**inputs, delta_softplus=True, return_last_state=True)
        loss = y.square().sum() if kept == "y" else states.square().sum()
        grads.append(torch.autograd.grad(loss, list(inputs.values()), allow_unused=True))
    for name, right, found in zip(inputs, *grads, strict=True):
        zero = torch.zeros_like(inputs[name])
        right, found = (zero if t is None else t for t in (right, found))
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_steps_are_the_scan(backend, groups):
    inputs = {name: t.detach() for name, t in make(9, groups=groups).items()}
    y, states = ops.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    constant = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            state = inputs["initial_states"].clone()
            for t in range(9):
                moving = {name: inputs[name][..., t] for name in ("u", "delta", "B", "C", "z")}
                y_t, state = ops.selective_scan_step(state, **moving, **constant, delta_softplus=True, backend=backend)
                torch.testing.assert_close(y_t, y[..., t])
            torch.testing.assert_close(state, states)


def test_steps_have_gradients():
    inputs = make(1, channels=2, size=2)
    moving = {name: inputs[name][..., 0] for name in ("u", "delta", "B", "C")}
    tensors = (inputs["initial_states"], moving["u"], moving["delta"], inputs["A"], moving["B"], moving["C"])
    assert torch.autograd.gradcheck(ops.selective_scan_step, tensors)


def test_views_are_read_as_they_are():
    inputs = make(70)
    right = run(chunked.selective_scan, inputs)
    views = {}
    for name, t in inputs.items():
        base = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        base[..., 1::2] = t.detach()
        views[name] = base[..., 1::2].requires_grad_()
    assert_same(run(chunked.selective_scan, views), right, inputs)
    turned = {name: t.detach().mT.contiguous().mT.requires_grad_() if t.ndim > 1 else t for name, t in inputs.items()}
    assert_same(run(chunked.selective_scan, turned), right, inputs)


def test_inputs_are_left_as_they_were():
    inputs = make(70)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    run(chunked.selective_scan, inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_precision(dtype, bound):
    inputs = make(300, batch=1, channels=16, size=8, dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    found, right = run(chunked.selective_scan, inputs), run(naive.selective_scan, exact)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for name, a, b in zip(["y", "states", *inputs], found, right, strict=True):
        assert rms_ratio(a, b) <= bound, name


@pytest.mark.parametrize("gap", [1, 50])
def test_huge_steps_stay_finite_and_right(gap):
    inputs = make(130, dtype=torch.float32)
    with torch.no_grad():
        inputs["delta"][..., ::gap] = 1e4
        inputs["u"][..., ::gap] *= 1e-4
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    found, right = run(chunked.selective_scan, inputs), run(naive.selective_scan, exact)
    for name, a, b in zip(["y", "states", *inputs], found, right, strict=True):
        assert torch.isfinite(a).all(), name
        assert rms_ratio(a, b) <= 1e-4, name


def test_autocast_changes_nothing():
    inputs = make(100, dtype=torch.float32)
    right = run(ops.selective_scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("chunked", "naive"):
            assert_same(run(ops.selective_scan, inputs, backend=backend), right, inputs, rtol=1e-3, atol=1e-3)


def test_no_state_of_a_token_is_kept():
    inputs = make(512, channels=64, size=16, batch=1, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked.selective_scan(**inputs, delta_softplus=True)
    assert max(kept) <= max(512 // chunked.LONGEST_CHUNK * 64 * 16, inputs["u"].numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("borders", [None, (1, 64, 70)])
def test_on_a_gpu(borders):
    inputs = make(100, groups=2)
    seq_idx = None if borders is None else documents_at(100, *borders)
    right = run(naive.selective_scan, inputs, seq_idx=seq_idx)
    there = {name: t.detach().cuda().requires_grad_() for name, t in inputs.items()}
    found = run(ops.selective_scan, there, seq_idx=None if seq_idx is None else seq_idx.cuda())
    assert_same([t.cpu() for t in found], right, inputs, rtol=1e-9, atol=1e-9)
