"""Causal convolution: naive against torch's conv1d, chunked against naive, documents, states, layouts and steps."""

import math

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import ops
from bimamba_lit.kernels.causal_conv1d import chunked, naive

# Channels, length, taps and the elements of a tile: tails shorter than the taps, and everything in one tile.
SIZES = [(3, 1, 4, 8), (3, 2, 4, 8), (5, 63, 4, 20), (5, 31, 4, 20), (7, 100, 3, 64), (4, 9, 1, 8), (4, 17, 2, 8),
         (6, 257, 4, 1 << 18)]  # fmt: skip


def make(channels, length, taps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, channels, length),
        "weight": (channels, taps),
        "bias": (channels,),
        "initial_states": (2, channels, taps - 1),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def documents(length):
    """Return seq_idx (2, L): documents of 1, 2, 3, ... tokens, whose numbers come again; and one document."""
    seq_idx = torch.zeros(2, length, dtype=torch.int32)
    seq_idx[0] = torch.arange(length).mul(2).sqrt().round() % 2
    return seq_idx


def run(function, inputs, activation="silu", seq_idx=None):
    outputs = function(**inputs, activation=activation, seq_idx=seq_idx, return_final_states=True)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outputs
    )  # fmt: skip
    return [*outputs, *torch.autograd.grad(loss, list(inputs.values()))]


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_naive_is_conv1d(taps, activation):
    inputs = make(5, 30, taps)

    def convolve(x, weight, bias, initial_states, activation, seq_idx, return_final_states):
        padded = torch.cat([initial_states, x], dim=-1)
        y = F.conv1d(padded, weight[:, None], bias, groups=5)
        return y if activation is None else y * torch.sigmoid(y), padded[..., 30:]

    for a, b in zip(run(naive.causal_conv1d, inputs, activation), run(convolve, inputs, activation), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seq_idx", [None, documents(6)])
@pytest.mark.parametrize("function", [naive.causal_conv1d, chunked.causal_conv1d])
def test_gradients(function, seq_idx, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 1)

    def convolve(x, weight, bias, states):
        return function(x, weight, bias, "silu", states, seq_idx, True)

    assert torch.autograd.gradcheck(convolve, tuple(make(2, 6, 3).values()))


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("given", ["x weight", "x weight bias", "x weight bias initial_states"])
@pytest.mark.parametrize(("channels", "length", "taps", "tile"), SIZES)
def test_chunked_is_naive(channels, length, taps, tile, given, with_documents, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", tile)
    inputs = {name: t for name, t in make(channels, length, taps).items() if name in given.split()}
    seq_idx = documents(length) if with_documents else None
    found = run(chunked.causal_conv1d, inputs, None if taps == 3 else "silu", seq_idx)
    right = run(naive.causal_conv1d, inputs, None if taps == 3 else "silu", seq_idx)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_documents_do_not_touch(backend):
    inputs = make(3, 40, 4)
    y, states = ops.causal_conv1d(**inputs, seq_idx=documents(40), return_final_states=True, backend=backend)
    borders = documents(40)[0].diff().nonzero().flatten() + 1
    starts, ends = [0, *borders.tolist()], [*borders.tolist(), 40]
    for start, end in zip(starts, ends, strict=True):
        past = inputs["initial_states"][:1] if start == 0 else None
        alone = (inputs["x"][:1, :, start:end], inputs["weight"], inputs["bias"], None, past)
        y_alone, states_alone = ops.causal_conv1d(*alone, return_final_states=True)
        torch.testing.assert_close(y[:1, :, start:end], y_alone)
    torch.testing.assert_close(states[:1], states_alone)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("split", [1, 2, 30])
def test_states_continue_the_sequence(split, backend):
    inputs = make(3, 40, 4)
    y, states = ops.causal_conv1d(**inputs, return_final_states=True)
    x, rest = inputs["x"], (inputs["weight"], inputs["bias"], None)
    first, past = ops.causal_conv1d(x[..., :split], *rest, inputs["initial_states"], None, True, backend=backend)
    second, last = ops.causal_conv1d(x[..., split:], *rest, past, None, True, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], dim=-1), y)
    torch.testing.assert_close(last, states)


def test_steps_are_the_convolution():
    inputs = {name: t.detach() for name, t in make(5, 9, 4).items()}
    y, states = ops.causal_conv1d(**inputs, activation="silu", return_final_states=True)
    state = inputs["initial_states"].clone()
    for t in range(9):
        y_t, state = ops.causal_conv1d_step(inputs["x"][..., t], state, inputs["weight"], inputs["bias"], "silu")
        torch.testing.assert_close(y_t, y[..., t])
    torch.testing.assert_close(state, states)


@pytest.mark.parametrize("length", [1, 50])
def test_layouts_and_slices(length):
    inputs = make(6, length, 4)
    right = run(chunked.causal_conv1d, inputs)
    base = torch.full((2, length, 20), math.nan, dtype=torch.float64)
    base[..., 5:11] = inputs["x"].detach().transpose(1, 2)
    x = base[..., 5:11].transpose(1, 2).requires_grad_()
    found = run(chunked.causal_conv1d, {**inputs, "x": x})
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_precision(dtype, bound):
    inputs = make(16, 200, 4, dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    found, right = run(chunked.causal_conv1d, inputs), run(naive.causal_conv1d, exact)
    for a, b in zip(found, right, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= bound * b.norm()
