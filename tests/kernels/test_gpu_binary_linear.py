"""The packed linear layer on a GPU, at the sizes of real models."""

import pytest
import torch

from bimamba_lit import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(10576, 2560), (2560, 5120), (1001, 2051)]


def ratio(values, right):
    return float((values.double() - right.double()).norm() / right.double().norm())


def make(out_features, in_features, groups=1):
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    torch.manual_seed(0)
    signs = ops.pack_signs(normal(out_features, in_features))
    terms = {
        "in_scale": normal(in_features),
        "out_scale": normal(out_features),
        "in_shift": normal(in_features) / 9,
        "out_shift": normal(1) / 9,
        "bias": normal(out_features),
    }
    return signs, terms | ({"group_scale": normal(out_features, groups)} if groups > 1 else {})


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_packed_and_unpacked_exactly(shape):
    w = torch.randn(shape, device="cuda")
    signs = ops.pack_signs(w)
    assert torch.equal(signs, ops.pack_signs(w, backend="naive"))
    assert torch.equal(ops.pack_signs(w.bfloat16().t()), ops.pack_signs(w.bfloat16().t(), backend="naive"))
    assert torch.equal(ops.unpack_signs(signs, shape[1]), ops.unpack_signs(signs, shape[1], backend="naive"))


@pytest.mark.parametrize(("shape", "groups"), [*((shape, 1) for shape in SHAPES), ((2560, 5120), 40)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.005), (torch.float16, 0.005)])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_values_of_every_size_and_dtype(shape, groups, tokens, dtype, bound, activation_bits):
    signs, terms = make(*shape, groups)
    x = torch.randn(shape[1], tokens, device="cuda").to(dtype).t()
    x[:, 3] *= 30
    poison = torch.full((tokens * shape[0] * 4,), torch.nan, device="cuda")
    del poison
    given = {**terms, "activation_bits": activation_bits}
    y = ops.binary_linear(x, signs, shape[1], **given)
    assert ratio(y, ops.binary_linear(x.double(), signs, shape[1], **given, backend="naive")) <= bound
    assert torch.equal(y, ops.binary_linear(x, signs, shape[1], **given))


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("in_features", [2080, 8864])  # words of a row: an odd number, and more than 256
def test_a_token_of_other_lengths(in_features, activation_bits):
    signs, terms = make(1001, in_features)
    # Where no load of 16 bytes may begin, and one for all.
    x = torch.randn(3, in_features + 1, device="cuda").bfloat16()[1:2, 1:]
    scale = torch.randn(in_features + 1, device="cuda")[1:]
    given = {**terms, "in_scale": scale, "in_shift": scale[:1] / 9, "activation_bits": activation_bits}
    right = ops.binary_linear(x.double(), signs, in_features, **given, backend="naive")
    assert ratio(ops.binary_linear(x, signs, in_features, **given), right) <= 0.005


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), [(1, 8192, 8192), (2, 1001, 8192)])
def test_a_token_of_many_inputs(tokens, out_features, in_features, dtype, activation_bits):
    signs, terms = make(out_features, in_features)
    x = torch.randn(tokens, in_features, device="cuda").to(dtype)
    right = ops.binary_linear(x.double(), signs, in_features, **terms, backend="naive")
    given = {**terms, "activation_bits": activation_bits}
    y = ops.binary_linear(x, signs, in_features, **given)
    assert ratio(y, right) <= (0.005 if activation_bits is None else 0.02)
    # Many launches at once, each of which begins before the one before has ended.
    assert all(
        torch.equal(y, again) for again in [ops.binary_linear(x, signs, in_features, **given) for _ in range(200)]
    )
    plain = ops.binary_linear(x, signs, in_features, activation_bits=activation_bits)
    right = ops.binary_linear(x.double(), signs, in_features, backend="naive")
    assert ratio(plain, right) <= (0.005 if activation_bits is None else 0.02)


def test_a_token_of_many_inputs_by_its_own_outputs():
    signs, _ = make(8192, 8192)
    scale = torch.full((1,), 8192**-0.5, device="cuda")
    tokens = [torch.randn(1, 8192, device="cuda").bfloat16()]
    for _ in range(200):  # each reads what the launch before wrote
        tokens.append(ops.binary_linear(tokens[-1], signs, 8192, out_scale=scale))
    weight = ops.unpack_signs(signs, 8192) * scale
    assert ratio(torch.cat(tokens[1:]), torch.cat(tokens[:-1]).float() @ weight.t()) <= 0.005


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_token_of_many_inputs_is_multiplied_exactly(activation_bits):
    signs, _ = make(8192, 8192)
    x = torch.randint(-127, 128, (1, 8192), device="cuda").half()
    x[:, ::512] = 127  # the step of each 512 inputs is 1, or 1 / 256
    y = ops.binary_linear(x, signs, 8192, activation_bits=activation_bits)
    assert torch.equal(y, (x.float() @ ops.unpack_signs(signs, 8192).t()).half())


@pytest.mark.parametrize(("tokens", "out_features", "in_features"), [(300, 1001, 2048), (2000, 8200, 8192)])
def test_products_of_8_bits_are_exact(tokens, out_features, in_features):
    signs, _ = make(out_features, in_features)
    x = torch.randint(-127, 128, (tokens, in_features), device="cuda").float()
    x[:, 0] = 127  # the step is 1
    y = ops.binary_linear(x, signs, in_features, activation_bits=8)
    assert torch.equal(y, x @ ops.unpack_signs(signs, in_features).t())


@pytest.mark.parametrize("tokens", [4, 300])
def test_gradients(tokens):
    signs, terms = make(2560, 5120, 40)
    x = torch.randn(tokens, 5120, device="cuda")
    upstream = torch.randn(tokens, 2560, device="cuda")

    def gradients(backend, dtype):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in {"x": x, **terms}.items()}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        given = dict(leaves)
        ops.binary_linear(given.pop("x"), signs, 5120, **given, backend=backend).backward(upstream.to(dtype))
        return {name: leaf.grad for name, leaf in leaves.items()}

    right = gradients("naive", torch.float64)
    for name, value in gradients("triton", torch.float32).items():
        assert ratio(value, right[name]) <= 1e-4, name


@pytest.mark.parametrize("straight_through", ["identity", "clipped", "tanh", "bireal"])
@pytest.mark.parametrize("relative", [False, True])
def test_the_dense_weight_and_its_gradients(straight_through, relative):
    shape = (2560, 5120)
    _, terms = make(*shape, 40)
    del terms["bias"]
    terms["out_shift"] = torch.randn(shape[0], device="cuda")  # the gradient of a single one is what cancels out
    tensors = {"latent": torch.randn(shape, device="cuda"), **terms}
    upstream = torch.randn(shape, device="cuda")
    options = {"straight_through": straight_through, "reach": tensors["latent"].abs().mean(1) if relative else None}

    def gradients(backend, dtype):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        weight = ops.binary_weight(dtype=dtype, **leaves, **options, backend=backend)
        weight.backward(upstream.to(weight.dtype))
        return {"weight": weight.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    right = gradients("naive", None)
    for dtype, bound in ((None, 1e-4), (torch.bfloat16, 0.005)):
        for name, value in gradients("triton", dtype).items():
            assert ratio(value, right[name]) <= bound, (name, dtype)


def test_rows_beyond_two_gigabytes():
    signs = torch.randint(0, 256, (40_000, 65_536), dtype=torch.uint8, device="cuda")  # 2.6 GB
    x = torch.randn(1, 524_288, device="cuda")
    last = ops.binary_linear(x, signs[-8:], 524_288, backend="naive")
    assert ratio(ops.binary_linear(x, signs, 524_288)[:, -8:], last) <= 1e-4


def test_it_compiles_without_a_graph_break():
    signs, terms = make(2560, 5120)
    compiled = torch.compile(lambda x: ops.binary_linear(x, signs, 5120, **terms), fullgraph=True)
    for tokens in (3, 40):
        x = torch.randn(tokens, 5120, device="cuda")
        assert ratio(compiled(x), ops.binary_linear(x, signs, 5120, **terms)) <= 1e-6
