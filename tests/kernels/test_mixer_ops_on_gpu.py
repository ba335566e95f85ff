"""What a mixer is made of, in Triton on a GPU at full shapes: right, deterministic, and as one compiled graph."""

import pytest
import torch

from bimamba_lit import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.005}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def scan(length, channels, dtype, batch=2, size=16):
    maps = normal(batch, length, 2 * size + 96, dtype=dtype)
    gate = normal(batch, length, 2 * channels, dtype=dtype)
    return {
        "u": normal(batch, length, channels, dtype=dtype).mT,
        "delta": normal(batch, length, channels, dtype=dtype).mT,
        "A": -normal(channels, size).abs(),
        "B": maps[..., 96 : 96 + size].mT,
        "C": maps[..., 96 + size :].mT,
        "D": normal(channels),
        "z": gate[..., channels:].mT,
        "delta_bias": normal(channels) - 3,
        "initial_states": normal(batch, channels, size),
    }


def conv(length, channels, dtype, batch=2):
    return {
        "x": normal(batch, length, 2 * channels + 48, dtype=dtype)[..., channels : 2 * channels].mT,
        "weight": normal(channels, 4),
        "bias": normal(channels),
        "initial_states": normal(batch, channels, 3, dtype=dtype),
    }


def norm(length, channels, dtype, batch=2):
    return {
        "x": normal(batch, length, channels, dtype=dtype),
        "weight": normal(channels),
        "z": normal(batch, length, 2 * channels + 48, dtype=dtype)[..., :channels],
    }


FORMS = {
    "scan": (ops.selective_scan, scan, {"delta_softplus": True, "return_last_state": True}),
    "conv": (ops.causal_conv1d, conv, {"activation": "silu", "return_final_states": True}),
    "norm": (ops.rms_norm, norm, {}),
}


def outputs_and_gradients(op, inputs, options, backend):
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = op(**inputs, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    directions = [normal(*t.shape).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), directions)]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("length", "channels"), [(1, 33), (63, 100), (257, 1000), (2000, 96)])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_naive_and_deterministic(form, length, channels, dtype):
    torch.manual_seed(0)
    op, make, options = FORMS[form]
    inputs = make(length, channels, dtype)
    if form != "norm":
        options = {**options, "seq_idx": (torch.arange(length, device="cuda") // 50).expand(2, -1)}
    found = outputs_and_gradients(op, inputs, options, "triton")
    right = outputs_and_gradients(op, {name: t.double() for name, t in inputs.items()}, options, "naive")
    for name, a, b in zip(["y", *("states",) * (form != "norm"), *inputs], found, right, strict=True):
        error = (a.double() - b).square().mean().sqrt()
        assert error <= BOUND[dtype] * b.square().mean().sqrt(), f"{name}: {error}"
    for a, b in zip(outputs_and_gradients(op, inputs, options, "triton"), found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_full_shapes(form):
    """A layer of the 2.7B model: the first sequence alone has the same outputs and gradients as in its batch."""
    torch.manual_seed(0)
    op, make, options = FORMS[form]
    inputs = make(2048, 5120, torch.bfloat16, batch=8)
    batched = {name for name, t in inputs.items() if t.shape[0] == 8}
    first = {name: t[:1] if name in batched else t for name, t in inputs.items()}
    found = op(**inputs, **options, backend="triton")
    alone = op(**first, **options, backend="triton")
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, alone)), strict=True):
        assert torch.equal(a[:1], b)
        assert torch.isfinite(a).all()


def test_a_norm_adds_the_gradient_of_its_residual():
    """Where autograd would: of a block of the 780M model, whose norm writes bf16."""
    torch.manual_seed(0)
    x, weight = (t.requires_grad_() for t in (normal(8, 2048, 1536), normal(1536)))
    directions = [normal(8, 2048, 1536, dtype=torch.bfloat16), normal(8, 2048, 1536)]
    found = torch.autograd.grad(ops.norm_and_residual(x, weight, dtype=torch.bfloat16), (x, weight), directions)
    right = torch.autograd.grad((ops.rms_norm(x, weight, dtype=torch.bfloat16), x * 1), (x, weight), directions)
    torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], right[1])


def test_offsets_beyond_32_bits():
    """The last of many channels of a long sequence lies more than 2^31 elements from the first."""
    length, channels = 210_000, 10_300
    x = torch.zeros(1, length, channels, dtype=torch.bfloat16, device="cuda")
    x[:, -8:] = normal(1, 8, channels, dtype=torch.bfloat16)
    weight, a, maps = normal(channels, 4), -normal(channels, 1).abs(), normal(1, 1, length, dtype=torch.bfloat16)
    with torch.no_grad():
        y = ops.causal_conv1d(x.mT, weight)[..., -4:]
        torch.testing.assert_close(y, ops.causal_conv1d(x.mT[..., -8:], weight)[..., -4:])
        z = ops.rms_norm(x[0], normal(channels)[:1].expand(channels))[-8:]
        assert torch.isfinite(z).all() and z.any()
        y = ops.selective_scan(x.mT, x.mT, a, maps, maps)[..., -8:]
        torch.testing.assert_close(y, ops.selective_scan(*(x.mT[..., -8:],) * 2, a, *(maps[..., -8:],) * 2))


def test_one_compiled_graph():
    inputs = scan(70, 64, torch.bfloat16)
    weight, gain = normal(64, 4), normal(64)

    def mixer(u, delta, A, B, C, z, weight, gain):
        u = ops.causal_conv1d(u, weight, activation="silu")
        y = ops.selective_scan(u, delta, A, B, C, z=z, delta_softplus=True)
        return ops.rms_norm(y.mT, gain, z.mT)

    tensors = [inputs[name] for name in ("u", "delta", "A", "B", "C", "z")]
    tensors = [t.detach().requires_grad_() for t in (*tensors, weight, gain)]
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True)):
        y = function(*tensors)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(a.detach().abs().max()))
