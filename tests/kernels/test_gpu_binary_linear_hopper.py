"""The packed linear layer on Hopper, where signs become numbers in registers, whatever sizes it is chosen for."""

from functools import partial

import pytest
import torch

from bimamba_lit import ops
from bimamba_lit.kernels.binary_linear import naive

layer = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton")
rounding = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_rounding")
triton_hopper = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_hopper")
many = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_hopper_many")
sparse = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_hopper_sparse")
configurations = pytest.importorskip("bimamba_lit.kernels.configurations")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
ROWS = [
    pytest.param(row.configuration, 8 if row.itemsize == 1 else None, id=f"{row.itemsize}-{index}")
    for index, row in enumerate(configurations.TABLE["binary_linear/hopper"])
]
SHAPES = [(10576, 2560), (1001, 2176), (7, 128)]  # 2,176: odd numbers of steps and of 16-byte loads


PLANNED = many.planned
HEIGHTS = ["as planned", "of two heights", "of one block"]


def cut(monkeypatch, heights):
    """Have products cut into tiles of the heights that a test names."""

    def changed(tokens, out_features, in_features, tokens_of_tile, costs, processors):
        if heights == "as planned":
            return PLANNED(tokens, out_features, in_features, tokens_of_tile, costs, processors)
        blocks = -(-out_features // 64)
        row_tiles = blocks if heights == "of one block" else max(1, round(blocks / (len(costs) - 0.5)))
        return many.Plan(row_tiles, row_tiles * -(-tokens // tokens_of_tile), 0.0, 0.0)

    monkeypatch.setattr(many, "planned", changed)
    monkeypatch.setattr(sparse, "planned", changed)


@pytest.fixture(params=sorted(sparse.COSTS))
def form(request, monkeypatch):
    """Have sparse products take one configuration."""
    monkeypatch.setattr(sparse, "COSTS", {request.param: sparse.COSTS[request.param]})


def ratio(values, right):
    values, right = values.detach().double(), right.detach().double()
    return float((values - right).norm() / right.norm())


def normal(*shape):
    return torch.randn(*shape, device="cuda")


def make(out_features, in_features):
    torch.manual_seed(0)
    terms = normal(in_features), normal(out_features), None, normal(in_features) / 9, normal(out_features) / 9
    return ops.pack_signs(normal(out_features, in_features)), terms, normal(out_features)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 128), torch.bfloat16),
        ((301, 2176), torch.float16),
        ((2050, 5120), torch.bfloat16),
        ((33, 16384), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("terms", ["both", "one for all", "none"])
@pytest.mark.parametrize("lies", ["in rows", "in columns", "within rows"])
@pytest.mark.parametrize("few", [False, True])
def test_tokens_are_rounded_in_the_order_of_bits(shape, dtype, terms, lies, few):
    torch.manual_seed(0)
    tokens, inputs = shape
    size = 1 if terms == "one for all" else inputs
    scale, shift = (None, None) if terms == "none" else (normal(size), normal(size))
    x = normal(inputs, tokens).to(dtype).t() if lies == "in columns" else normal(tokens, inputs + 8).to(dtype)
    x = x[:, -inputs:] if lies == "within rows" else x[:, :inputs]
    poison = torch.full((tokens * inputs,), torch.nan, device="cuda")
    del poison
    numbers, scales = rounding.rounded(x, scale, shift, few)
    scales = scales[:, :tokens]
    scaled = x.float() if scale is None else x.float() * scale
    right, step = naive.eight_bits(scaled)
    above = scaled.double() / step + 0.5
    half = (above - above.round()).abs() < 1e-4  # a sum and product with one rounding may fall on its other side
    right, half = (of.unflatten(1, (-1, 4, 8)).transpose(2, 3).flatten(1) for of in (right, half))
    assert (numbers - right).abs().max() <= 1 and (half | (numbers == right)).all()
    assert ratio(scales[0], step[:, 0]) <= 1e-6
    assert torch.allclose(scales[3], -scales[0] * numbers.float().sum(1), rtol=1e-6)
    wide = x.double()
    for found, exact in (
        (scales[1], wide.sum(1)),
        (scales[2], wide.sum(1) * 0 if shift is None else (wide * shift).sum(1)),
    ):
        assert (found - exact).abs().max() <= 1e-5 * wide.abs().sum(1).max()


@pytest.mark.parametrize("few", [False, True])
def test_whole_numbers_zeros_and_what_is_not_finite_are_rounded(few):
    x = torch.randint(-127, 128, (64, 1024), device="cuda").float()
    x[:, 0] = 127  # the step is 1
    x[3], x[5, 7], x[6, 8] = 0, torch.inf, torch.nan
    numbers, scales = rounding.rounded(x.to(torch.bfloat16), None, None, few)
    assert scales[0, [5, 6]].isnan().all() and scales[3, [5, 6]].isnan().all() and not numbers[3].any()
    right = x.unflatten(1, (-1, 4, 8)).transpose(2, 3).flatten(1)
    rest = [token for token in range(64) if token not in (3, 5, 6)]
    assert torch.equal(numbers[rest].float(), right[rest]) and not scales[0, 3]


@pytest.fixture(params=[1, 3], ids=["one part", "three parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(triton_hopper, "_parts", lambda *where: request.param)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("chosen", "bits"), ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_with_every_term(shape, dtype, chosen, bits):
    signs, terms, bias = make(*shape)
    for tokens in (17, 300, 1025):
        x = normal(shape[1], tokens).to(dtype).t()  # not contiguous
        x[:, 3] *= 30
        right = ops.binary_linear(x.double(), signs, shape[1], *terms, bias, activation_bits=bits, backend="naive")
        poison = torch.full((tokens * shape[0] * 16,), torch.nan, device="cuda")
        del poison
        with configurations.overriding("binary_linear/hopper", chosen):
            y = triton_hopper.binary_gemm_hopper(x, signs, shape[1], terms, bias, bits)
            again = triton_hopper.binary_gemm_hopper(x, signs, shape[1], terms, bias, bits)
        assert y.dtype == dtype
        assert ratio(y, right) <= 0.005, tokens
        assert torch.equal(y, again), tokens


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("chosen", "bits"), ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_whole_numbers_are_exact(shape, chosen, bits):
    signs, _, _ = make(*shape)
    x = torch.randint(-127, 128, (300, shape[1]), device="cuda").to(torch.bfloat16)
    x[:, 0] = 127  # the step is 1
    with configurations.overriding("binary_linear/hopper", chosen):
        y = triton_hopper.binary_gemm_hopper(x, signs, shape[1], (None,) * 5, None, bits)
    assert torch.equal(y, (x.float() @ ops.unpack_signs(signs, shape[1]).t()).to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", ["every", "of inputs", "scales"])
def test_values_of_many_tokens(shape, dtype, names, monkeypatch):
    signs, terms, bias = make(*shape)
    terms = {"every": terms, "of inputs": (terms[0], None, None, terms[3], None), "scales": (*terms[:2], *[None] * 3)}
    terms, bias = terms[names], bias if names == "every" else None
    for tokens in (17, 1025, 3000):
        x = normal(shape[1], tokens).to(dtype).t()  # not contiguous
        x[:, 3] *= 30
        right = ops.binary_linear(x.double(), signs, shape[1], *terms, bias, activation_bits=8, backend="naive")
        for heights in HEIGHTS:
            cut(monkeypatch, heights)
            poison = torch.full((tokens * (shape[0] + shape[1]) * 4,), torch.nan, device="cuda")
            del poison
            y = many.binary_gemm_hopper_many(x, signs, shape[1], terms, bias)
            assert y.dtype == dtype
            assert ratio(y, right) <= 0.005, (tokens, heights)
            assert torch.equal(y, many.binary_gemm_hopper_many(x, signs, shape[1], terms, bias))


@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_whole_numbers_of_many_tokens_are_exact(shape, heights, monkeypatch):
    cut(monkeypatch, heights)
    signs, _, _ = make(*shape)
    x = torch.randint(-127, 128, (300, shape[1]), device="cuda").to(torch.bfloat16)
    x[:, 0] = 127  # the step is 1
    y = many.binary_gemm_hopper_many(x, signs, shape[1], (None,) * 5, None)
    assert torch.equal(y, (x.float() @ ops.unpack_signs(signs, shape[1]).t()).to(y.dtype))


@pytest.mark.parametrize(
    ("way", "bits"),
    [
        (partial(triton_hopper.binary_gemm_hopper, activation_bits=None), None),
        (partial(triton_hopper.binary_gemm_hopper, activation_bits=8), 8),
        (many.binary_gemm_hopper_many, 8),
    ],
)
def test_small_and_large_tokens_keep_their_precision_and_others_are_not_touched_by_what_is_not_finite(bits, way):
    signs, terms, _ = make(256, 1024)
    terms = (terms[0], terms[1], None, None, None)
    x = normal(64, 1024) * torch.logspace(-6, 1, 64, device="cuda")[:, None]
    x = x.to(torch.float16)
    x[5, 7] = torch.inf
    y = way(x, signs, 1024, terms, None).double()
    assert not y[5].isfinite().any()
    right = ops.binary_linear(x.double(), signs, 1024, *terms, activation_bits=bits, backend="naive")
    for token in set(range(20, 64)) - {5}:
        assert ratio(y[token], right[token]) <= 0.005, token


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 9216)])
@pytest.mark.parametrize("names", ["every", "of inputs", "scales", "none"])
def test_values_by_sparse_tensor_cores(shape, dtype, names, monkeypatch):
    signs, terms, bias = make(*shape)
    terms = {
        "every": terms,
        "of inputs": (terms[0], None, None, terms[3], None),
        "scales": (*terms[:2], *[None] * 3),
        "none": (None,) * 5,
    }[names]
    bias = bias if names == "every" else None
    for tokens in (17, 1025, 3000):
        x = normal(shape[1], tokens).to(dtype).t()  # not contiguous
        x[:, 3] *= 30
        right = ops.binary_linear(x.double(), signs, shape[1], *terms, bias, backend="naive")
        for heights in HEIGHTS:
            cut(monkeypatch, heights)
            poison = torch.full((tokens * (shape[0] + shape[1]) * 4,), torch.nan, device="cuda")
            del poison
            y = sparse.binary_gemm_hopper_sparse(x, signs, shape[1], terms, bias)
            assert y.dtype == dtype
            assert ratio(y, right) <= 0.005, (tokens, heights)
            assert torch.equal(y, sparse.binary_gemm_hopper_sparse(x, signs, shape[1], terms, bias))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_whole_numbers_by_sparse_tensor_cores_are_exact(shape, heights, monkeypatch):
    cut(monkeypatch, heights)
    signs, _, _ = make(*shape)
    x = torch.randint(-127, 128, (300, shape[1]), device="cuda").to(torch.bfloat16)  # their sums have 8 bits
    y = sparse.binary_gemm_hopper_sparse(x, signs, shape[1], (None,) * 5, None)
    assert torch.equal(y, (x.float() @ ops.unpack_signs(signs, shape[1]).t()).to(y.dtype))


def test_x_may_begin_anywhere_and_so_may_signs():
    signs, terms, bias = make(256, 1024)
    apart = torch.empty(signs.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(signs).copy_(signs)
    x = normal(700 * 1024 + 3).bfloat16()[3:].view(700, 1024)
    right = ops.binary_linear(x.double(), signs, 1024, *terms, bias, backend="naive")
    assert ratio(sparse.binary_gemm_hopper_sparse(x, apart, 1024, terms, bias), right) <= 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_any_size_keep_their_precision_as_pairs(dtype):
    signs, terms, _ = make(256, 1024)
    terms = (terms[0], terms[1], None, None, None)
    x = normal(64, 1024) * torch.logspace(-6, 3.5, 64, device="cuda")[:, None]  # sums beyond float16's largest
    x = x.clamp(-6e4, 6e4).to(dtype)
    terms = (terms[0].abs().clamp(max=3), terms[1] / 1e4, None, None, None)
    x[5, 7] = torch.inf
    y = sparse.binary_gemm_hopper_sparse(x, signs, 1024, terms, None).double()
    assert not y[5].isfinite().any()
    right = ops.binary_linear(x.double(), signs, 1024, *terms, backend="naive")
    for token in set(range(32, 64)) - {5}:
        assert ratio(y[token], right[token]) <= 0.005, token


@pytest.mark.parametrize("tokens", [40, 200, 256, 2048])
@pytest.mark.parametrize("bits", [None, 8])
def test_the_layer_takes_these_ways(tokens, bits, monkeypatch):
    name = "binary_gemm_hopper" + (
        ("_sparse" if tokens >= 256 else "") if bits is None else ("_many" if tokens >= 512 else "")
    )
    way, calls = getattr(layer, name), []

    def spy(*args):
        calls.append(args)
        return way(*args)

    monkeypatch.setattr(layer, name, spy)
    signs, terms, bias = make(10576, 2560)
    x = normal(tokens, 2560).bfloat16().requires_grad_()
    y = ops.binary_linear(x, signs, 2560, *terms, bias, activation_bits=bits)
    assert len(calls) == 1
    right = ops.binary_linear(x.double(), signs, 2560, *terms, bias, activation_bits=bits, backend="naive")
    assert ratio(y, right) <= 0.005
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert ratio(gradient, torch.autograd.grad(right, x, upstream.double())[0]) <= 0.01
