"""The linear layer of latent weights by packed signs, but for Hopper's product with them, against its definition.

Triton's interpreter has no tensor cores, so here the definition of the packed linear layer stands for that product:
what is packed, which terms go where, and every gradient are the kernel's.
"""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bimamba_lit import ops
from bimamba_lit.binarize import FBI, DoubledInputs, Unfinished
from bimamba_lit.kernels.binary_linear import naive
from bimamba_lit.kernels.latent_linear import triton as kernel

pytestmark = pytest.mark.usefixtures("poisoned")
TERMS = ("in_scale", "out_scale", "in_shift", "out_shift", "bias")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ratio(values, right):
    values, right = values.detach().double(), right.detach().double()
    return float((values - right).norm() / right.norm())


@pytest.fixture
def by_signs(monkeypatch):
    """Take packed signs whatever the device and the number of tokens; return the products that are taken."""
    taken = []

    def product(x, signs, in_features, terms, bias):
        taken.append(tuple(signs.shape))
        x = F.pad(x, (0, in_features - x.shape[1]))
        terms = [
            None if t is None else F.pad(t, (0, n - len(t))) if len(t) > 1 else t
            for t, n in zip(terms, (in_features, signs.shape[0], 0, in_features, signs.shape[0]), strict=True)
        ]
        return naive.binary_linear(x, signs, in_features, *terms, bias)

    monkeypatch.setattr(kernel, "binary_gemm_hopper_sparse", product, raising=False)  # not there with every Triton
    monkeypatch.setattr(kernel, "WORTHWHILE", 1)
    monkeypatch.setattr(kernel, "SMALLEST", 1)
    monkeypatch.setattr(kernel, "_on_hopper", lambda device, features: True)
    return taken


@pytest.mark.parametrize("shape", [(8, 128), (96, 256), (264, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_packed_by_rows_and_by_columns(shape, dtype):
    latent = normal(*shape[::-1], dtype=dtype).t()
    latent[0, 0], latent[1, 1] = 0, torch.nan
    by_row, by_column = kernel.pack_both_ways(latent)
    padded = F.pad(latent.t(), (0, -shape[0] % 128))
    assert torch.equal(by_row, ops.pack_signs(latent, backend="naive"))
    assert torch.equal(by_column, ops.pack_signs(padded, backend="naive"))


def gradients(function, upstream, options, tensors):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves, **options)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def make(tokens, out_features, in_features, names, single=False):
    i, o = (1, 1) if single else (in_features, out_features)
    shapes = {"in_scale": (i,), "out_scale": (o,), "in_shift": (i,), "out_shift": (o,), "bias": (o,)}
    shapes["group_scale"] = (out_features, 1)
    tensors = {name: normal(*shapes[name], seed=index) for index, name in enumerate(names)}
    latent = normal(out_features, in_features, seed=8)
    return {"x": normal(*tokens, in_features, seed=9), "latent": latent, **tensors}


@pytest.mark.parametrize(
    ("names", "single", "slope", "reach"),
    [
        ((), False, "identity", 0),
        (TERMS, True, "identity", 40),
        (TERMS, False, "identity", 1),
        (TERMS, False, "clipped", 0),
        (("in_scale", "out_shift"), False, "tanh", 1),
        (("out_scale", "in_shift"), False, "bireal", 40),
    ],
)
def test_every_term_and_its_gradient(names, single, slope, reach, by_signs):
    tensors, upstream = make((5,), 40, 128, names, single), normal(5, 40, seed=10)
    options = {"straight_through": slope, "reach": normal(reach, seed=11).abs() + 0.5 if reach else None}

    def by_op(x, latent, straight_through, reach, **terms):
        return kernel._op(x, latent, *map(terms.get, TERMS), reach, straight_through)[0]

    found = gradients(by_op, upstream, options, tensors)
    right = gradients(partial(ops.latent_linear, backend="naive"), upstream, options, tensors)
    assert by_signs == [(40, 16), (128, 16)]
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.shape == right[name].shape, name
        assert ratio(value, right[name]) <= 1e-4, name


def test_dtypes_under_autocast(by_signs):
    tensors, upstream = make((2, 3), 40, 128, ("in_scale", "group_scale", "out_scale")), normal(2, 3, 40, seed=10)
    with torch.autocast("cpu", torch.bfloat16):
        found, right = (
            gradients(partial(ops.latent_linear, backend=backend), upstream, {}, tensors)
            for backend in ("triton", "naive")
        )
    assert len(by_signs) == 2
    for name, value in found.items():
        assert value.dtype == right[name].dtype == (torch.bfloat16 if name == "y" else torch.float32), name
        assert ratio(value, right[name]) <= 0.01, name


def test_only_what_is_asked_for_is_computed(by_signs):
    tensors = make((6,), 40, 128, ("in_scale",))
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    half["x"].requires_grad_()
    ops.latent_linear(**half, backend="triton").sum().backward()
    assert half["x"].grad is not None and half["latent"].grad is None and len(by_signs) == 2
    half["x"] = half["x"].detach()
    half["latent"].requires_grad_()
    ops.latent_linear(**half, backend="triton").sum().backward()
    assert half["latent"].grad is not None and len(by_signs) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"x": normal(6, 128)},
        {"x": normal(6, 128).bfloat16(), "bias": normal(40)},
        {"x": normal(6, 64).bfloat16(), "latent": normal(40, 64).bfloat16()},
        {"latent": normal(41, 128).bfloat16()},
        {"group_scale": normal(40, 2).bfloat16()},
    ],
    ids=["float32", "bias", "inputs", "outputs", "groups"],
)
def test_what_signs_cannot_do_takes_the_dense_weight(change, by_signs):
    half = {name: tensor.bfloat16() for name, tensor in make((6,), 40, 128, ()).items()} | change
    try:
        right = ops.latent_linear(**half, backend="naive")
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            ops.latent_linear(**half, backend="triton")
    else:
        assert ratio(ops.latent_linear(**half, backend="triton"), right) <= 0.01
    assert by_signs == []


def test_the_ops_are_registered_as_torch_wants_it(by_signs):
    tensors = {name: t.requires_grad_() for name, t in make((6,), 40, 128, TERMS).items()}
    x, latent, *terms = tensors.values()
    opcheck(
        kernel._op,
        (x.detach().bfloat16().requires_grad_(), latent, *terms, None, "identity"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_layers_take_it_until_something_asks_for_a_dense_weight(by_signs):
    whole = torch.nn.Linear(128, 40)
    x = normal(6, 128).bfloat16()
    layer, progressive = FBI(whole), FBI(whole)
    progressive.unfinished = Unfinished("rows", 0.5)
    double = DoubledInputs(whole, FBI, 0.25)
    with ops.as_on_gpu(), torch.autocast("cpu", torch.bfloat16):
        for dense in (progressive, double):
            dense(x)
            assert by_signs == []
        y = layer(x)
        assert by_signs == [(40, 16)]
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), y) and len(by_signs) == 2
            layer(x[:1])
            assert len(by_signs) == 2
    assert ratio(y, F.linear(x.float(), layer.weight, layer.bias)) <= 0.005


def test_it_is_mapped_over_by_torch_func(by_signs):
    half = {name: tensor.bfloat16() for name, tensor in make((2, 3), 40, 128, ("in_scale",)).items()}
    right = ops.latent_linear(**half, backend="triton")
    x = half.pop("x")
    mapped = torch.func.vmap(lambda x: ops.latent_linear(x, **half, backend="triton"))(x)
    assert torch.equal(mapped, right) and len(by_signs) == 3
