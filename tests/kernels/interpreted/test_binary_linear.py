"""The packed linear layer and the dense weight in Triton against their definitions, forward and every gradient."""

import pytest
import torch
from torch.library import opcheck

from bimamba_lit import ops
from bimamba_lit.kernels.binary_linear import naive
from bimamba_lit.kernels.binary_linear import triton as kernel
from bimamba_lit.kernels.binary_linear import triton_hopper as hopper
from bimamba_lit.kernels.binary_linear.triton_counts import counts_fit
from bimamba_lit.kernels.binary_linear.triton_counts_pairs import pairs_fit
from bimamba_lit.kernels.binary_weight import triton as weight_kernel
from bimamba_lit.kernels.configurations import Configuration, overriding

pytestmark = pytest.mark.usefixtures("poisoned")
TERMS = ("in_scale", "out_scale", "group_scale", "in_shift", "out_shift", "bias")
SLOPES = ("identity", "clipped", "tanh", "bireal")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(out_features, in_features, groups, names=TERMS, single=False):
    i, o = (1, 1) if single else (in_features, out_features)
    shapes = {
        "in_scale": (i,),
        "out_scale": (o,),
        "group_scale": (out_features, groups),
        "in_shift": (i,),
        "out_shift": (o,),
        "bias": (o,),
    }
    return {name: normal(*shapes[name], seed=index) for index, name in enumerate(names)}


def ratio(values, right):
    return float((values.double() - right.double()).norm() / right.double().norm())


def gradients(function, tensors, upstream):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (12, 64), (7, 301)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_packed_and_unpacked_exactly(shape, dtype):
    w = normal(*shape[::-1], dtype=dtype).t()
    w[0, 0] = 0
    signs = ops.pack_signs(w, backend="naive")
    assert torch.equal(ops.pack_signs(w, backend="triton"), signs)
    unpacked = ops.unpack_signs(signs, shape[1], dtype, backend="triton")
    assert torch.equal(unpacked, ops.unpack_signs(signs, shape[1], dtype, backend="naive"))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("terms", "single"), [(terms, False) for terms in [(), *((name,) for name in TERMS), TERMS]] + [(TERMS, True)]
)
def test_every_term_and_its_gradient(tokens, terms, single):
    given = make(20, 48, 3, terms, single)
    signs = ops.pack_signs(normal(20, 48))
    tensors = {"x": normal(tokens, 48, seed=9), **given}

    def by(backend):
        return gradients(
            lambda x, **terms: ops.binary_linear(x, signs, 48, **terms, backend=backend),
            tensors,
            normal(tokens, 20, seed=8),
        )

    right = by("naive")
    for name, value in by("triton").items():
        assert ratio(value, right[name]) <= 1e-4, name


@pytest.mark.parametrize("sizes", [(1, 1, 1), (20, 155, 5), (16, 272, 2), (20, 192, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.005), (torch.float16, 0.005)])
def test_sizes_dtypes_and_strides(sizes, dtype, bound):
    out_features, in_features, groups = sizes
    terms = make(out_features, in_features, groups)
    signs = ops.pack_signs(normal(out_features, in_features))
    x = normal(in_features, 2, 7, dtype=dtype).permute(2, 1, 0)[:, 0]  # nothing contiguous
    y = ops.binary_linear(x, signs, in_features, **terms, backend="triton")
    right = ops.binary_linear(x.double(), signs, in_features, **terms, backend="naive")
    assert y.dtype == dtype and y.shape == right.shape
    assert ratio(y, right) <= bound


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 2)])
def test_any_leading_shape(shape):
    signs = ops.pack_signs(normal(5, 9))
    x = normal(*shape, 9)
    y = ops.binary_linear(x, signs, 9, backend="triton")
    torch.testing.assert_close(y, ops.binary_linear(x, signs, 9, backend="naive"))


def test_integer_products_are_exact():
    signs = ops.pack_signs(normal(40, 300))
    x = torch.randint(-127, 128, (3, 300), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # the step is 1, whatever the digits
    for bits in (None, 8):
        y = ops.binary_linear(x, signs, 300, activation_bits=bits, backend="triton")
        assert torch.equal(y, ops.binary_linear(x, signs, 300, backend="naive"))


@pytest.mark.parametrize(
    ("tokens", "dtype", "grouped"),
    [(2, torch.float32, False), (2, torch.bfloat16, True), (33, torch.bfloat16, False), (33, torch.float32, True)],
)
def test_8_bit_activations(tokens, dtype, grouped):
    terms = make(20, 128, 4)
    if not grouped:
        del terms["group_scale"]
    signs = ops.pack_signs(normal(20, 128))
    x = normal(tokens, 128, dtype=dtype)
    y = ops.binary_linear(x, signs, 128, **terms, activation_bits=8, backend="triton")
    right = ops.binary_linear(x.double(), signs, 128, **terms, activation_bits=8, backend="naive")
    assert ratio(y, right) <= (1e-5 if dtype == torch.float32 else 0.005)
    exact = ops.binary_linear(x.double(), signs, 128, **terms, backend="naive")
    assert 1e-3 < ratio(right, exact) < 0.02


@pytest.mark.parametrize(("inputs", "descriptors"), [(128, 1), (256, 0)])
def test_products_of_many_tokens_of_8_bits_are_exact(inputs, descriptors):
    terms = make(20, 256, 1, ("out_scale", "out_shift"), single=True)
    signs = ops.pack_signs(normal(20, 256))
    x = torch.randint(-127, 128, (33, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # the step is 1
    blocks = {"TOKENS": 32, "ROWS": 16, "INPUTS": 64, "NEAR": 2, "DESCRIPTORS": descriptors}
    with (
        overriding("binary_linear/operands8", Configuration({"INPUTS": inputs, "ROWS": 4, "BYTES": 8})),
        overriding("binary_linear/gemm8", Configuration(blocks)),
    ):
        y = ops.binary_linear(x, signs, 256, activation_bits=8, backend="triton")
        shifted = ops.binary_linear(x, signs, 256, **terms, activation_bits=8, backend="triton")
    assert torch.equal(y, ops.binary_linear(x, signs, 256, backend="naive"))
    assert ratio(shifted, ops.binary_linear(x.double(), signs, 256, **terms, backend="naive")) <= 1e-6


@pytest.mark.parametrize("inputs", [64, 256])
def test_tokens_are_prepared_in_the_order_of_bits(inputs):
    x, scale, shift = normal(256, 3).half().t(), normal(256, seed=1), normal(256, seed=2)
    terms = (scale, None, None, shift, None)
    with overriding("binary_linear/hopper_tokens", Configuration({"INPUTS": inputs})):
        numbers, scales = hopper.prepare(x, terms)
    scales = scales[:3, :3]
    _, step = naive.eight_bits(x * scale)
    assert ratio(numbers * step, (x * scale).unflatten(1, (-1, 2, 16)).transpose(2, 3).flatten(1)) <= 1e-3
    assert ratio(scales, torch.stack([step[:, 0], x.float().sum(1), (x * shift).sum(1)])) <= 1e-5


UNGROUPED = tuple(name for name in TERMS if name != "group_scale")


def test_outliers_zeros_and_numbers_that_are_not_finite():
    signs = ops.pack_signs(normal(20, 64))
    x = normal(5, 64)
    x[0, 3], x[1], x[2, 5], x[3, 6] = 1e4, 0, torch.inf, torch.nan
    y = ops.binary_linear(x, signs, 64, backend="triton")
    right = ops.binary_linear(x.double(), signs, 64, backend="naive")
    assert ratio(y[0] - y[0, :1], right[0] - right[0, :1]) <= 1e-4 and not y[1].any()
    assert not y[2:4].isfinite().any() and y[4].isfinite().all()


@pytest.mark.parametrize(
    ("rows", "warps", "bits", "terms", "single"),
    [
        (16, 1, None, (), False),
        (32, 2, 8, UNGROUPED, False),
        pytest.param(16, 4, None, UNGROUPED, True, marks=pytest.mark.slow),
        pytest.param(32, 2, 8, (), False, marks=pytest.mark.slow),
    ],
)
def test_counts_of_planes(rows, warps, bits, terms, single):
    out_features, in_features = 24, 25 * 32
    signs = ops.pack_signs(normal(out_features + 1, in_features))[1:]
    given = make(out_features, in_features, 1, terms, single) | {"activation_bits": bits}
    x = normal(in_features, 2, dtype=torch.bfloat16).t()
    assert counts_fit(in_features, None, x.device)
    chosen = Configuration({"ROWS": rows}, num_warps=warps)
    with overriding("binary_linear/counts", chosen):
        y = ops.binary_linear(x, signs, in_features, **given, backend="triton")
    right = ops.binary_linear(x.double(), signs, in_features, **given, backend="naive")
    assert ratio(y, right) <= 0.005


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # a token that is not finite
@pytest.mark.parametrize("in_features", [640, 8192])  # one program, and two
def test_counts_are_exact_and_show_what_is_not_finite(in_features):
    signs = ops.pack_signs(normal(40, in_features))
    x = torch.randint(-127, 128, (2, in_features), generator=torch.Generator().manual_seed(0)).half()
    x[:, ::512] = 127  # of each warp: steps are 1, or 1 / 256
    for bits in (None, 8):
        y = ops.binary_linear(x, signs, in_features, activation_bits=bits, backend="triton")
        assert torch.equal(y, ops.binary_linear(x.float(), signs, in_features, backend="naive").half())
    x[0, in_features - 5], x[1] = torch.inf, 0
    y = ops.binary_linear(x, signs, in_features, backend="triton")
    assert not y[0].isfinite().any() and not y[1].any()


def rounded_by_stretches(x):
    """Round numbers (M, I) to multiples of a 127th of the largest of each 512."""
    stretches = x.unflatten(1, (-1, 512))
    step = stretches.abs().amax(2, keepdim=True) / 127
    return ((stretches / step + 0.5).floor() * step).flatten(1)


@pytest.mark.parametrize(("bits", "terms", "single"), [(8, UNGROUPED, False), (None, UNGROUPED, True), (8, (), False)])
def test_counts_of_pairs(bits, terms, single, monkeypatch):
    monkeypatch.setattr(kernel, "HOPPER", True)  # also with a Triton with which one program serves
    out_features, in_features = 40, 8192
    signs = ops.pack_signs(normal(out_features, in_features))
    given = make(out_features, in_features, 1, terms, single)
    x = normal(in_features, 2, dtype=torch.bfloat16).t()
    assert pairs_fit(in_features, x.device)
    y = ops.binary_linear(x, signs, in_features, **given, activation_bits=bits, backend="triton")
    right = ops.binary_linear(x.double(), signs, in_features, **given, backend="naive")
    if bits == 8:
        scaled = x.double() * given.get("in_scale", 1)
        moved = (rounded_by_stretches(scaled) - scaled) @ ops.unpack_signs(signs, in_features, torch.float64).t()
        right += moved * given.get("out_scale", 1)
    assert ratio(y, right) <= 0.005


@pytest.mark.parametrize("straight_through", SLOPES)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.008)])
def test_the_dense_weight_and_its_gradients(straight_through, single, relative, dtype, bound):
    tensors = {"latent": normal(51, 13).t(), **make(13, 51, 3, TERMS[:-1], single)}
    tensors["latent"][0, 0] = 0
    reach = None
    if relative:
        tensors["latent"] *= 0.02
        reach = 0.02 * (0.5 + normal(2 if single else 26, seed=9).abs())[::2]  # not contiguous
        tensors["latent"][3, 5] = reach[3 % len(reach)]  # at the edge is inside

    def by(backend, dtype):
        options = {"dtype": dtype, "reach": reach, "backend": backend}
        return gradients(
            lambda latent, **terms: ops.binary_weight(latent, straight_through, **terms, **options),
            tensors,
            normal(13, 51, seed=8),
        )

    right, found = by("naive", None), by("triton", dtype)
    assert found["y"].dtype == dtype
    for name, value in found.items():
        assert ratio(value, right[name]) <= bound, name


@pytest.mark.parametrize(
    "terms",
    [(), *((name,) for name in TERMS[:-1]), ("in_scale", "out_scale"), ("in_scale", "out_scale", "in_shift")],
)
def test_each_schemes_terms_of_the_dense_weight(terms):
    tensors = {"latent": normal(9, 40), **make(9, 40, 5, terms)}

    def by(backend):
        return gradients(
            lambda latent, **terms: ops.binary_weight(latent, **terms, backend=backend), tensors, normal(9, 40, seed=8)
        )

    right = by("naive")
    for name, value in by("triton").items():
        assert ratio(value, right[name]) <= 1e-6, name


def test_the_registered_ops_are_sound():
    signs = ops.pack_signs(normal(13, 48))
    terms = [normal(48).requires_grad_(), None, normal(13, 3).requires_grad_(), None, None]
    bias = normal(13).requires_grad_()
    opcheck(kernel._op, (normal(3, 48).requires_grad_(), signs, 48, *terms, bias, None))
    reach = normal(13).abs()
    opcheck(weight_kernel._op, (normal(13, 48).requires_grad_(), 48, *terms, reach, "tanh", torch.float32))


def test_it_compiles_without_a_graph_break():
    signs, terms = ops.pack_signs(normal(13, 48)), make(13, 48, 3)

    def layer(x, latent):
        weight = ops.binary_weight(latent, backend="triton")
        return ops.binary_linear(x, signs, 48, **terms, backend="triton") + x @ weight.t()

    x, latent = normal(3, 48), normal(13, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, latent), layer(x, latent))


def test_half_precision_under_autocast():
    signs, terms = ops.pack_signs(normal(13, 48)), make(13, 48, 3)
    x = normal(40, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.binary_linear(x, signs, 48, **terms, backend="triton")
    assert y.dtype == torch.float32
    right = ops.binary_linear(x, signs, 48, **terms, backend="naive")
    assert 1e-5 < ratio(y, right) <= 0.01
