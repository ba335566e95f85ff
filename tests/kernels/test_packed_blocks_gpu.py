"""One token through packed Mamba-2 blocks on a GPU, at the sizes of real models, and in a model's step."""

import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.binarize import FBI, ScaledSign, Sign, binarize_, pack_
from bimamba_lit.models import packed_step

kernel = pytest.importorskip("bimamba_lit.kernels.packed_blocks.triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZE, TAPS, WIDTH = 128, 4, 64


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def packed(out_features, in_features, groups):
    terms = {"in_scale": normal(in_features), "out_shift": normal(out_features) / 9, "bias": normal(1)}
    if groups > 1:
        terms |= {"group_scale": normal(out_features, groups)}
    return ops.Packed(ops.pack_signs(normal(out_features, in_features)), **terms)


def make(d_model, dtype, batch, groups, count=2):
    torch.manual_seed(0)
    inner, heads = 2 * d_model, 2 * d_model // WIDTH
    channels = inner + 2 * SIZE
    blocks = [
        ops.BlockParameters(
            norm_weight=normal(d_model, dtype=dtype),
            in_proj=packed(inner + channels + heads, d_model, groups),
            conv_weight=normal(channels, TAPS, dtype=dtype),
            conv_bias=normal(channels, dtype=dtype),
            dt_bias=normal(heads, dtype=dtype) - 2,
            A_log=normal(heads, dtype=dtype),
            D=normal(heads, dtype=dtype),
            gated_weight=normal(inner, dtype=dtype),
            out_proj=packed(d_model, inner, groups),
            eps=1e-5,
            gated_eps=1e-5,
        )
        for _ in range(count)
    ]
    conv_states = [normal(batch, channels, TAPS - 1, dtype=dtype) for _ in range(count)]
    ssm_states = [normal(batch, heads, WIDTH, SIZE) for _ in range(count)]
    return normal(batch, d_model), conv_states, ssm_states, blocks


def widened(x, conv_states, ssm_states, blocks):
    def wide(values):
        return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]

    def widened_block(block):
        projections = {name: ops.Packed(*wide(getattr(block, name))) for name in ("in_proj", "out_proj")}
        return ops.BlockParameters(*wide(block))._replace(**projections)

    return x.double(), wide(conv_states), wide(ssm_states), [widened_block(block) for block in blocks]


def ratio(values, right):
    return float((values.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01), (torch.float16, 0.005)])
@pytest.mark.parametrize(("d_model", "batch", "groups"), [(2560, 1, 1), (1536, 3, 1), (1536, 3, 4)])
@torch.no_grad()
def test_a_step_of_full_size(d_model, batch, groups, dtype, bound):
    x, conv_states, ssm_states, blocks = given = make(d_model, dtype, batch, groups)
    y, *states = ops.packed_blocks(*widened(*given), backend="naive")
    copies = [[state.clone() for state in states] for states in (conv_states, ssm_states)]
    again, *moved_again = ops.packed_blocks(x, *copies, blocks)
    found, *moved = ops.packed_blocks(*given)
    assert ratio(found.double() - x.double(), y - x.double()) <= bound
    assert torch.equal(found, again)
    for value, exact, repeated in zip(sum(moved, []), sum(states, []), sum(moved_again, []), strict=True):
        assert ratio(value, exact) <= bound
        assert torch.equal(value, repeated)


def packed_model(scheme, dtype, double_inputs=None, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 512, "n_layer": 4, "vocab_size": 211} | options
    lm = MambaLM(MambaConfig(**sizes)).cuda()
    return pack_(binarize_(lm, scheme, double_inputs=double_inputs or {})).eval().to(dtype)


def last_logits(lm, ids):
    _, state = lm.prefill(ids[:, :4], lm.init_state(len(ids)))
    for t in range(4, ids.shape[1]):
        found, state = lm.step(ids[:, t], state)
    return found


@pytest.fixture
def launched(monkeypatch):
    """How many blocks each launch of the kernels took."""
    counts, run = [], kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args: counts.append(len(args[3])) or run(*args))
    return counts


@pytest.mark.parametrize("mixer", ["mamba2", ["mamba2", "mamba2", "mamba", "mamba2"]])
@pytest.mark.parametrize("scheme", [FBI, Sign, ScaledSign])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_model_takes_it_by_itself(scheme, mixer, dtype, launched, monkeypatch):
    lm = packed_model(scheme, dtype, mixer=mixer)
    ids = torch.randint(211, (2, 9), device="cuda")
    found = last_logits(lm, ids)
    assert launched == ([4] if mixer == "mamba2" else [2, 1]) * 5
    monkeypatch.setattr(packed_step, "packed_parameters", lambda block: None)
    plain, exact = last_logits(lm, ids), last_logits(lm.float(), ids)
    assert ratio(found, exact) <= max(1e-4, 1.2 * ratio(plain, exact))


IN_AND_OUT = {"in_proj": [0.25, 0], "out_proj": [1, 0]}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("double_inputs", "dtype", "batch", "options"),
    [  # 51 and 52 words a row of out_proj, 19 and 20 of in_proj: loaded one at a time, or four
        *(({"out_proj": share}, torch.float32, 2, {}) for share in (0.6, 0.625, [1, 0.2])),
        *(({"out_proj": share}, torch.bfloat16, 2, {}) for share in (0.6, 0.625, [1, 0.2])),
        ({"in_proj": 0.2}, torch.float32, 1, {}),
        ({"in_proj": 0.25}, torch.bfloat16, 1, {}),
        ({"in_proj": 1}, torch.float16, 3, {}),
        (IN_AND_OUT, torch.float32, 4, {}),
        (IN_AND_OUT, torch.float16, 1, {}),
        (IN_AND_OUT, torch.bfloat16, 1, {}),
        (IN_AND_OUT, torch.bfloat16, 4, {}),
        ({"in_proj": 1}, torch.float32, 2, {"d_model": 2560, "n_layer": 2}),
        ({"in_proj": 0.3}, torch.bfloat16, 2, {"d_model": 4096, "n_layer": 2}),
    ],
)
@torch.no_grad()
def test_second_signs(double_inputs, dtype, batch, options, counted, launched, monkeypatch):
    if not counted:  # as where tensor cores do not count
        monkeypatch.setattr(kernel, "counts_fit", lambda *given: False)
    lm = packed_model(FBI, dtype, double_inputs, **options)
    ids = torch.randint(211, (batch, 9), device="cuda")
    found = last_logits(lm, ids)
    assert launched == [len(lm.backbone.layers)] * 5
    monkeypatch.setattr(packed_step, "packed_parameters", lambda block: None)
    plain, exact = last_logits(lm, ids), last_logits(lm.float(), ids)
    assert ratio(found, exact) <= max(1e-4, 1.2 * ratio(plain, exact))


@pytest.mark.parametrize(("batch", "options"), [(5, {}), (1, {"headdim": 16})])
@torch.no_grad()
def test_what_the_kernels_do_not_do_is_done_by_the_ops_of_the_blocks(batch, options, launched):
    lm = packed_model(FBI, torch.float32, **options)
    ids = torch.randint(211, (batch, 6), device="cuda")
    found = last_logits(lm, ids)
    assert not launched
    torch.testing.assert_close(found, lm(ids).logits[:, -1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_definition_can_be_recorded_in_a_graph():
    given = make(64, torch.float32, 1, 1)
    expected, *_ = ops.packed_blocks(*given, backend="naive")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *_ = ops.packed_blocks(*given, backend="naive")
    graph.replay()
    torch.testing.assert_close(y, expected)
