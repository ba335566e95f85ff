"""The packed linear layer against its formula, written as a sum over every weight."""

import pytest
import torch

from bimamba_lit import ops
from bimamba_lit.kernels.binary_linear import chunked

TERMS = ("in_scale", "out_scale", "group_scale", "in_shift", "out_shift", "bias")


def make(out_features, in_features, groups, dtype=torch.float64, single=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    i, o = (1, 1) if single else (in_features, out_features)
    terms = {
        "in_scale": normal(i),
        "out_scale": normal(o),
        "group_scale": normal(out_features, groups),
        "in_shift": normal(i),
        "out_shift": normal(o),
        "bias": normal(o),
    }
    return normal(2, 3, in_features), normal(out_features, in_features).detach(), terms


def formula(x, w, in_scale=None, out_scale=None, group_scale=None, in_shift=None, out_shift=None, bias=None):
    """DESIGN's formula, one output at a time."""
    out_features, in_features = w.shape
    ones_i, ones_o = torch.ones(in_features).to(x), torch.ones(out_features).to(x)
    in_scale, in_shift = (
        ones_i * t for t in (1 if in_scale is None else in_scale, 0 if in_shift is None else in_shift)
    )
    out_scale = ones_o * (1 if out_scale is None else out_scale)
    out_shift = ones_o * (0 if out_shift is None else out_shift)
    bias = ones_o * (0 if bias is None else bias)
    groups = 1 if group_scale is None else group_scale.shape[1]
    size = in_features // groups
    ys = []
    for o in range(out_features):
        y = out_shift[o] * x.sum(-1) + (in_shift * x).sum(-1) + bias[o]
        for g in range(groups):
            part = sum((1 if w[o, i] > 0 else -1) * in_scale[i] * x[..., i] for i in range(g * size, (g + 1) * size))
            y = y + out_scale[o] * (1 if group_scale is None else group_scale[o, g]) * part
        ys.append(y)
    return torch.stack(ys, dim=-1)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("terms", [(), *((name,) for name in TERMS), TERMS])
@pytest.mark.parametrize("single", [False, True])
def test_every_term(terms, single, backend, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 1)
    x, w, everything = make(37, 15, 3, single=single)
    given = {name: everything[name].detach() for name in terms}
    y = ops.binary_linear(x.detach(), ops.pack_signs(w), 15, **given, backend=backend)
    torch.testing.assert_close(y, formula(x.detach(), w, **given))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients(backend):
    x, w, terms = make(3, 6, 2)
    signs = ops.pack_signs(w)

    def linear(x, *values):
        return ops.binary_linear(x, signs, 6, **dict(zip(terms, values, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(linear, (x, *terms.values()))


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0, 3)])
def test_any_leading_shape(shape):
    w = torch.randn(5, 9)
    x = torch.randn(*shape, 9)
    for backend in ("naive", "chunked"):
        y = ops.binary_linear(x, ops.pack_signs(w), 9, backend=backend)
        torch.testing.assert_close(y, x @ torch.where(w > 0, 1.0, -1.0).t())


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.01)])
def test_precision(dtype, bound, backend):
    x, w, terms = make(40, 256, 2, dtype)
    with torch.no_grad():
        terms = {name: t.detach() for name, t in terms.items()}
        y = ops.binary_linear(x, ops.pack_signs(w), 256, **terms, backend=backend)
        right = formula(x.double(), w, **{name: t.double() for name, t in terms.items()})
    assert y.dtype == dtype
    assert (y.double() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_autocast(backend):
    x, w, terms = make(40, 256, 2, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ops.binary_linear(x, ops.pack_signs(w), 256, **terms, backend=backend)
    right = formula(x.double(), w, **{name: t.double() for name, t in terms.items()})
    assert y.dtype == torch.float32
    assert (y.double() - right).norm() <= 0.01 * right.norm()
