"""What a mixer is made of, in Triton, against the definitions in float64: outputs, every gradient, documents, views."""

import pytest
import torch
from torch.library import opcheck

from bimamba_lit import ops
from bimamba_lit.kernels.rms_norm.naive import norm_and_residual as naive_norm_and_residual
from bimamba_lit.kernels.sums import sum_parts

BOUND = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.005}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def scan(length, channels=5, size=3, groups=(), batch=2):
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length, seed=1),
        "A": -normal(channels, size).abs(),
        "B": normal(batch, *groups, size, length, seed=2),
        "C": normal(batch, *(1 for _ in groups), size, length, seed=3),
        "D": normal(channels),
        "z": normal(batch, channels, length, seed=4),
        "delta_bias": normal(channels, seed=5),
        "initial_states": normal(batch, channels, size, seed=6),
    }


def conv(length, channels=5, taps=4, batch=2):
    return {
        "x": normal(batch, channels, length),
        "weight": normal(channels, taps),
        "bias": normal(channels),
        "initial_states": normal(batch, channels, taps - 1, seed=1),
    }


def norm(tokens, width=7, groups=1):
    return {
        "x": normal(tokens, width * groups),
        "weight": normal(width * groups),
        "z": normal(tokens, width * groups, seed=1),
    }


SCAN = {"delta_softplus": True, "return_last_state": True}
CONV = {"activation": "silu", "return_final_states": True}
CASES = {
    "scan of one token": (ops.selective_scan, scan(1), SCAN),
    "scan of odd width": (ops.selective_scan, scan(63, channels=33, size=2, batch=1), SCAN),
    "scan of groups": (ops.selective_scan, scan(21, channels=6, size=2, groups=(3,), batch=1), SCAN),
    "scan of many chunks": (ops.selective_scan, scan(257, size=1, batch=1), SCAN),
    "conv of one token": (ops.causal_conv1d, conv(1), CONV),
    "conv of odd width": (ops.causal_conv1d, conv(63, channels=257, batch=1), CONV),
    "conv of many spans": (ops.causal_conv1d, conv(100, batch=1), CONV),
    "conv of two taps": (ops.causal_conv1d, conv(10, taps=2), CONV),
    "conv of one tap": (ops.causal_conv1d, conv(10, taps=1), {"activation": None, "return_final_states": True}),
    "norm": (ops.rms_norm, norm(63), {"eps": 1e-3}),
    "norm of one token": (ops.rms_norm, norm(1, width=33), {}),
    "norm of groups": (ops.rms_norm, norm(9, groups=3), {"groups": 3}),
}


def documents(inputs):
    """Return seq_idx for inputs (B, D, L): documents of many lengths; a number comes again."""
    t = next(iter(inputs.values()))
    seq_idx = torch.zeros(t.shape[0], t.shape[2], dtype=torch.int32)
    for border in (1, 3, 12, 16, 17, 64, 66, 256):
        seq_idx[0, border:] = 1 - seq_idx[0, border:]
    return seq_idx


def outputs_and_gradients(op, inputs, options, backend):
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = op(**inputs, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = [normal(*t.shape, seed=7).to(t.dtype) for t in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), directions)
    return dict(zip(["y", "states", *inputs], [*outputs, *gradients][-len(inputs) - len(outputs) :], strict=False))


def assert_as_naive(op, inputs, options, dtype=torch.float64):
    """Compare with the definition in float64 of the same rounded inputs."""
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    found = outputs_and_gradients(op, inputs, options, "triton")
    right = outputs_and_gradients(op, {name: t.double() for name, t in inputs.items()}, options, "naive")
    for name, t in found.items():
        assert t.shape == right[name].shape, name
        if not t.numel():
            continue
        error = (t.double() - right[name]).square().mean().sqrt()
        assert error <= BOUND[dtype] * right[name].square().mean().sqrt(), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_it_is_naive(case):
    assert_as_naive(*CASES[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["scan of groups", "conv of two taps", "norm of groups"])
def test_precision(case, dtype):
    assert_as_naive(*CASES[case], dtype)


def test_a_norm_to_half_precision():
    x, weight, direction = normal(9, 7).float(), normal(7).float(), normal(9, 7, seed=1).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = ops.rms_norm(x, weight, dtype=torch.bfloat16, backend="triton")
    right = ops.rms_norm(x, weight, backend="naive")
    torch.testing.assert_close(y, right.bfloat16())
    found = torch.autograd.grad(y, leaves, direction)
    torch.testing.assert_close(found, torch.autograd.grad(right, leaves, direction.float()))


def residual_gradients(function, x, weight):
    """Return those of x and the gains where the sum of a stream and what a norm becomes is used, either, or a part."""
    y, stream = function(x, weight)
    directions = [normal(*x.shape, seed=seed) for seed in (1, 2)]
    mixed = (y.to(x.dtype) * directions[0]).sum(), (stream.mean(-1, keepdim=True) * directions[1]).sum()
    used = {"both": sum(mixed), "norm": mixed[0], "stream": mixed[1], "expanded": stream.sum() + mixed[0]}
    return {
        name: torch.autograd.grad(loss, (x, weight), retain_graph=True, materialize_grads=True)
        for name, loss in used.items()
    }


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
def test_a_norm_adds_the_gradient_of_its_residual(dtype, result):
    """Twice, as with activations that are kept or computed again."""
    x, weight = normal(2, 9, 7).to(dtype).requires_grad_(), normal(7).float().requires_grad_()

    def triton(x, weight):
        return ops.norm_and_residual(x, weight, 1e-3, result, backend="triton")

    def checkpointed(x, weight):
        return torch.utils.checkpoint.checkpoint(triton, x, weight, use_reentrant=False)

    y, stream = triton(x, weight)
    assert torch.equal(stream, x) and torch.equal(y, ops.rms_norm(x, weight, None, 1e-3, 1, result, backend="triton"))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    right = residual_gradients(lambda *given: naive_norm_and_residual(*given, 1e-3), *wide)
    for function in (triton, checkpointed):
        for name, found in residual_gradients(function, x, weight).items():
            for a, b, leaf in zip(found, right[name], (x, weight), strict=True):
                assert a.dtype == leaf.dtype
                assert (a.double() - b).norm() <= BOUND[result] * b.norm(), name


def test_a_compiled_norm_and_its_residual():
    x, weight = normal(9, 7).float().requires_grad_(), normal(7).float().requires_grad_()

    def total(x, weight):
        y, stream = ops.norm_and_residual(x, weight, backend="triton")
        return (y * stream).sum() + stream.square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    right = torch.autograd.grad(total(x, weight), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight), (x, weight)), right)


@pytest.mark.parametrize("case", ["scan of groups", "conv of many spans", "conv of one token"])
def test_documents(case):
    op, inputs, options = CASES[case]
    assert_as_naive(op, inputs, {**options, "seq_idx": documents(inputs)})


def test_documents_and_spans(monkeypatch):
    """Documents that begin in spans and between them, and spans without a beginning."""
    from bimamba_lit.kernels.selective_scan import triton as form

    op, inputs, options = CASES["scan of groups"]
    monkeypatch.setattr(form, "SPAN", 4)
    assert_as_naive(op, inputs, options)
    assert_as_naive(op, inputs, {**options, "seq_idx": documents(inputs)})


@pytest.mark.parametrize("case", ["scan of groups", "conv of two taps", "norm of groups"])
def test_only_what_is_given_counts(case):
    op, inputs, options = CASES[case]
    needed = {name: inputs[name] for name in ("u", "delta", "A", "B", "C", "x", "weight") if name in inputs}
    options = {name: value for name, value in options.items() if name == "groups"}
    assert_as_naive(op, needed, options)


@pytest.mark.parametrize("case", ["scan of groups", "conv of two taps", "norm of groups"])
def test_views_are_read_as_they_are(case):
    op, inputs, options = CASES[case]
    right = outputs_and_gradients(op, inputs, options, "triton")
    views = {}
    for name, t in inputs.items():
        base = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
        base[..., 1::2] = t
        views[name] = base[..., 1::2]
    turned = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in inputs.items()}
    for other in (views, turned):
        for name, t in outputs_and_gradients(op, other, options, "triton").items():
            torch.testing.assert_close(t, right[name], msg=name)


def test_one_output_may_go_unused():
    op, inputs, options = CASES["scan of groups"]
    for kept in (0, 1):
        gradients = []
        for backend in ("naive", "triton"):
            tensors = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            loss = op(**tensors, **options, backend=backend)[kept].square().sum()
            gradients.append(torch.autograd.grad(loss, list(tensors.values()), allow_unused=True))
        for name, right, found in zip(inputs, *gradients, strict=True):
            torch.testing.assert_close(found, torch.zeros_like(found) if right is None else right, msg=name)


def at(inputs, names, t):
    return {name: inputs[name][..., t] for name in names}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_of_a_selective_scan(dtype):
    inputs = {name: t.to(dtype) for name, t in scan(4, channels=18, groups=(3,)).items()}
    state = right_state = inputs["initial_states"].to(torch.promote_types(dtype, torch.float32))
    state = state.clone()
    constant = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    for t in range(4):
        moving = at(inputs, ("u", "delta", "B", "C", "z"), t)
        options = {**moving, **constant, "delta_softplus": True}
        y, after = ops.selective_scan_step(state, **options, backend="triton")
        right, right_state = ops.selective_scan_step(right_state, **options, backend="naive")
        assert after is state
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(after, right_state)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_of_a_convolution(dtype):
    inputs = {name: t.to(dtype) for name, t in conv(4, channels=7).items()}
    state = right_state = inputs["initial_states"]
    state = state.clone()
    for t in range(4):
        rest = (inputs["weight"], inputs["bias"], "silu")
        y, after = ops.causal_conv1d_step(inputs["x"][..., t], state, *rest, backend="triton")
        right, right_state = ops.causal_conv1d_step(inputs["x"][..., t], right_state, *rest, backend="naive")
        assert after is state
        torch.testing.assert_close(y, right)
        assert torch.equal(after, right_state)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head_skip", [True, False])
def test_steps_of_ssd(dtype, head_skip):
    wide = torch.promote_types(dtype, torch.float32)
    state = right_state = normal(2, 4, 5, 3).to(wide)
    state = state.clone()
    x, z, dt, D = normal(2, 4, 5), normal(2, 4, 5, seed=1), normal(2, 4), normal(4, 5)
    tensors = (x, dt, -normal(4).abs(), normal(2, 2, 3), normal(2, 2, 3, seed=1), D[:, 0] if head_skip else D, z)
    arguments = (*(t.to(dtype) for t in tensors), normal(4, seed=1), True, (0.25, 1.0))
    for _ in range(2):
        y, after = ops.ssd_step(state, *arguments, backend="triton")
        right, right_state = ops.ssd_step(right_state, *arguments, backend="naive")
        assert after is state
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(after, right_state)


def test_steps_with_gradients_leave_the_state_alone():
    inputs = {name: t.requires_grad_() for name, t in scan(1).items()}
    state = inputs["initial_states"]
    before = state.detach().clone()
    arguments = {**at(inputs, ("u", "delta", "B", "C"), 0), "A": inputs["A"]}
    y, after = ops.selective_scan_step(state, **arguments, backend="triton")
    (y.sum() + after.sum()).backward()
    assert torch.equal(state.detach(), before) and inputs["A"].grad is not None


def wanting_gradients(inputs):
    return {name: t.float().requires_grad_() for name, t in inputs.items()}


def test_torch_knows_the_operations():
    inputs = scan(2, channels=2, size=1, batch=1)
    scanned = (*wanting_gradients(inputs).values(), documents(inputs), True, True)
    opcheck(torch.ops.bimamba_lit.selective_scan, scanned)
    opcheck(torch.ops.bimamba_lit.causal_conv1d, (*wanting_gradients(conv(2, batch=1)).values(), None, True))
    opcheck(torch.ops.bimamba_lit.rms_norm, (*wanting_gradients(norm(2)).values(), 1e-5, 1, torch.float32))
    step = [normal(2, 5, 3), normal(2, 5), normal(2, 5), normal(5, 3), normal(2, 3), normal(2, 3), None, None, None]
    opcheck(torch.ops.bimamba_lit.selective_scan_step, (*step, True))
    opcheck(torch.ops.bimamba_lit.causal_conv1d_step, (normal(2, 5), normal(2, 5, 3), normal(5, 4), None, True))
    heads = [normal(2, 6, 4, 3), normal(2, 6, 4), normal(2, 6), normal(6), normal(2, 3, 3), normal(2, 3, 3)]
    opcheck(torch.ops.bimamba_lit.ssd_step, (*heads, None, None, None, True, 0.0, 1.0))


@pytest.mark.parametrize("shape", [(0, 3), (1, 5), (300, 3, 7), (513, 16)])
def test_sums_of_parts(shape):
    torch.testing.assert_close(sum_parts(normal(*shape)), normal(*shape).sum(0), rtol=1e-12, atol=1e-12)


def test_compiled_without_a_break():
    inputs = {"x": normal(1, 5, 2), "weight": normal(5, 2), "gain": normal(5)}
    inputs = {name: t.float().requires_grad_() for name, t in inputs.items()}
    a = -normal(5, 1).abs().float()

    def mixer(x, weight, gain):
        x = ops.causal_conv1d(x, weight, activation="silu", backend="triton")
        y, last = ops.selective_scan(x, x, a, x[:, :1], x[:, 2:3], return_last_state=True, backend="triton")
        return ops.rms_norm(y.mT, gain, x.mT, backend="triton").sum() + last.sum()

    right = torch.autograd.grad(mixer(**inputs), list(inputs.values()))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for a_found, b_right in zip(torch.autograd.grad(compiled(**inputs), list(inputs.values())), right, strict=True):
        torch.testing.assert_close(a_found, b_right)
