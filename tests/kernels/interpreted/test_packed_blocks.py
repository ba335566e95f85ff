"""One token through packed Mamba-2 blocks in Triton against the composition that defines it."""

import pytest
import torch
from torch.library import opcheck

from bimamba_lit import ops
from bimamba_lit.kernels.configurations import Configuration, overriding
from bimamba_lit.kernels.packed_blocks import triton as kernel

pytestmark = pytest.mark.usefixtures("poisoned")
TERMS = ("in_scale", "out_scale", "group_scale", "in_shift", "out_shift", "bias")
D_MODEL, HEADS, WIDTH, SIZE, TAPS = 64, 2, 32, 12, 4
INNER, CHANNELS = HEADS * WIDTH, HEADS * WIDTH + 2 * SIZE


class Normal:
    """Normal numbers, other ones at every call."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(dtype)


@pytest.fixture(autouse=True)
def by_digits(request, monkeypatch):
    """Take what GPUs do that have no instruction for counts, in tests that do not ask for counts."""
    if "counted" not in request.fixturenames:
        monkeypatch.setattr(kernel, "counts_fit", lambda *given: False)


def packed(normal, out_features, in_features, names, groups=1, single=False, second=()):
    bitmap = ops.pack_signs(torch.tensor([second], dtype=torch.float32))[0] if second else None
    first, in_features = in_features, in_features + 32 * sum(second)
    i, o = (1, 1) if single else (in_features, out_features)
    shapes = {
        "in_scale": (i,),
        "out_scale": (o,),
        "group_scale": (out_features, groups),
        "in_shift": (1 if single else first,),
        "out_shift": (o,),
        "bias": (o,),
    }
    terms = {name: normal(*shapes[name]) / 4 for name in names}
    return ops.Packed(ops.pack_signs(normal(out_features, in_features)), **terms, bitmap=bitmap)


def make(
    names=(),
    dtype=torch.float32,
    batch=1,
    single=False,
    conv_bias=True,
    blocks=2,
    d_model=D_MODEL,
    heads=HEADS,
    second=(),
    second_in=(),
):
    """Return the arguments of a step: states that are not contiguous, numbers that `dtype` holds.

    Words with a second sign are those of every `out_proj`, and those of each block's `in_proj` in turn.
    """
    normal = Normal()
    channels = heads * WIDTH + 2 * SIZE
    conv_states = [normal(batch, TAPS - 1, channels, dtype=dtype).mT for _ in range(blocks)]
    ssm_states = [normal(batch, heads, SIZE, WIDTH).mT for _ in range(blocks)]
    made = [
        make_block(normal, names, dtype, single, conv_bias, d_model, heads, second, words)
        for words in second_in or [()] * blocks
    ]
    return normal(batch, d_model), conv_states, ssm_states, made


def make_block(normal, names, dtype, single, conv_bias, d_model, heads, second, second_in):
    inner = heads * WIDTH
    channels = inner + 2 * SIZE
    block = ops.BlockParameters(
        norm_weight=normal(d_model),
        in_proj=packed(normal, inner + channels + heads, d_model, names, 2, single, second_in),
        conv_weight=normal(channels, TAPS),
        conv_bias=normal(channels) if conv_bias else None,
        dt_bias=normal(heads) - 2,
        A_log=normal(heads),
        D=normal(heads),
        gated_weight=normal(inner),
        out_proj=packed(normal, d_model, inner, names, 2, single, second),
        eps=1e-5,
        gated_eps=1e-3,
    )
    return cast(block, dtype)


def cast(block, dtype):
    fields = block._asdict().items()
    return block._replace(**{name: value.to(dtype) for name, value in fields if isinstance(value, torch.Tensor)})


def widened(x, conv_states, ssm_states, blocks):
    wide = [[state.double() for state in states] for states in (conv_states, ssm_states)]
    return x.double(), *wide, [cast(block, torch.float64) for block in blocks]


def ratio(values, right):
    return float((values.double() - right).norm() / right.norm())


@torch.no_grad()
def check(given, bound):
    x, conv_states, ssm_states, _ = given
    y, *states = ops.packed_blocks(*widened(*given), backend="naive")
    found, *moved = ops.packed_blocks(*given, backend="triton")
    assert all(after is before for after, before in zip(sum(moved, []), conv_states + ssm_states, strict=True))
    assert ratio(found - x, y - x) <= bound
    for value, exact in zip(sum(moved, []), sum(states, []), strict=True):
        assert ratio(value, exact) <= bound


@pytest.mark.parametrize(
    ("names", "single"), [(terms, False) for terms in [(), *((name,) for name in TERMS), TERMS]] + [(TERMS, True)]
)
def test_every_term(names, single):
    check(make(names, single=single, blocks=1 + len(names) // 6), 5e-5)


@pytest.mark.parametrize(
    ("names", "shifts"), [((), 0), (SECOND := ("in_scale", "in_shift", "out_shift"), 96), (SECOND, 1), (SECOND, 160)]
)
def test_words_with_a_second_sign(names, shifts):
    """A shift is of the first inputs, one for all, or of all that there are."""
    given = make(names, batch=2, blocks=1, heads=3, second=(1, 0, 1))
    if shifts:
        block = given[3][0]
        given[3][0] = block._replace(out_proj=block.out_proj._replace(in_shift=Normal()(shifts)))
    assert kernel.supports(given[0], given[1][0], given[2][0], given[3][0])
    check(given, 5e-5)


@pytest.mark.parametrize(
    ("dtype", "bound", "second_in", "second"),
    [
        (torch.float32, 5e-5, [(0, 1), (1, 1), ()], (1, 0)),
        (torch.bfloat16, 0.01, [(), (1, 0)], ()),
    ],
)
def test_second_signs_of_in_proj(dtype, bound, second_in, second):
    """In the first, a middle and the last block, others of each; a shift is of the first inputs, or of all."""
    given = make(SECOND, dtype, batch=2, blocks=len(second_in), second=second, second_in=second_in)
    if second:
        block = given[3][1]
        given[3][1] = block._replace(in_proj=block.in_proj._replace(in_shift=Normal()(128)))
    assert all(kernel.supports(given[0], *step) for step in zip(*given[1:], strict=True))
    check(given, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.005), (torch.float16, 0.001)])
def test_half_precision_and_several_sequences(dtype, bound):
    check(make(TERMS, dtype, batch=2, conv_bias=False), bound)


NO_GROUPS = tuple(name for name in TERMS if name != "group_scale")


@pytest.fixture
def counted(request, monkeypatch):
    """Rows of a program and warps that share them, of `project` and `mix`; fails where digits are made, not planes."""
    rows, split, mix_split = request.param
    monkeypatch.setattr(kernel, "_start", lambda *args: args[-1] and start(*args))
    project = Configuration({"ROWS": rows, "SPLIT": split}, num_warps=rows // 16 * split)
    mix = Configuration({"SPLIT": mix_split}, num_warps=2 * mix_split)
    with overriding("packed_blocks/project_planes", project), overriding("packed_blocks/mix_planes", mix):
        yield


start = kernel._start


@pytest.mark.parametrize(
    ("counted", "dtype", "bound", "more"),
    [
        ((32, 1, 2), torch.float32, 5e-5, {"names": NO_GROUPS}),
        pytest.param(
            (16, 2, 2),
            torch.float32,
            5e-5,
            {"blocks": 1, "names": NO_GROUPS, "single": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (16, 4, 4),
            torch.bfloat16,
            0.01,  # rounded towards 0 in the interpreter
            {"batch": 2, "conv_bias": False, "blocks": 1},
            marks=pytest.mark.slow,
        ),
        (
            (32, 1, 2),
            torch.float32,
            5e-5,
            {"blocks": 1, "heads": 8, "second": (0, 1, 1, 0, 0, 0, 1, 0), "names": NO_GROUPS},
        ),
        (
            (32, 1, 2),
            torch.float32,
            5e-5,
            {"heads": 1, "second_in": [(0, 1, 0, 1), (1, 0, 0, 0)], "names": SECOND},
        ),
        ((64, 1, 2), torch.float16, 0.001, {"d_model": 640, "blocks": 1}),
    ],
    indirect=["counted"],
)
def test_counts_of_planes(counted, dtype, bound, more):
    check(make(dtype=dtype, **{"d_model": 128, "heads": 4} | more), bound)


@pytest.mark.parametrize("counted", [(32, 1, 2)], indirect=True)
def test_words_far_smaller_than_others_are_counted_in_their_places(counted):
    given = make(blocks=1, d_model=128, heads=4)
    given[0][:] *= torch.tensor([1.0, 1e-3, 1e-6, 1e-12]).repeat_interleave(32)
    check(given, 5e-5)


def test_shapes_that_the_kernels_do_not_take_are_composed():
    given = make(batch=kernel.MOST_TOKENS + 1)
    assert not kernel.supports(given[0], given[1][0], given[2][0], given[3][0])
    found, *_ = ops.packed_blocks(*given, backend="triton")
    assert torch.equal(found, ops.packed_blocks(*given, backend="naive")[0])


def test_numbers_that_are_not_finite_stay_so():
    check_not_finite()


@pytest.mark.parametrize("counted", [(32, 1, 2)], indirect=True)
def test_counts_of_numbers_that_are_not_finite_stay_so(counted):
    check_not_finite()


def check_not_finite():
    given = make(batch=3, blocks=1)
    given[0][0, 3], given[0][1, 40] = torch.inf, torch.nan
    with torch.no_grad():
        y, *_ = ops.packed_blocks(*given, backend="triton")
    assert not y[:2].isfinite().any() and y[2].isfinite().all()


def test_the_registered_op_is_sound():
    x, conv_states, ssm_states, blocks = make(TERMS, blocks=1)
    given = x, conv_states, ssm_states, *kernel._flat(blocks)
    opcheck(kernel._op, given, test_utils=("test_schema", "test_faketensor"))


def test_it_compiles_without_a_graph_break():
    def step(x, conv_states, ssm_states):
        return ops.packed_blocks(x, conv_states, ssm_states, blocks, backend="triton")[0]

    x, conv_states, ssm_states, blocks = make(blocks=1)
    with torch.no_grad():
        right = step(x, [t.clone() for t in conv_states], [t.clone() for t in ssm_states])
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, conv_states, ssm_states), right)


@pytest.mark.parametrize("field", ["in_proj", "norm_weight", "A_log"])
def test_wrong_shapes_are_named(field):
    *given, (block,) = make(blocks=1)
    wrong = {"in_proj": block.out_proj, "norm_weight": block.A_log, "A_log": block.norm_weight}[field]
    with pytest.raises(ValueError, match="signs" if field == "in_proj" else field):
        ops.packed_blocks(*given, [block._replace(**{field: wrong})])


def test_as_many_states_as_blocks_are_needed():
    x, conv_states, ssm_states, blocks = make(blocks=1)
    with pytest.raises(ValueError, match="1 blocks, 0 conv_states"):
        ops.packed_blocks(x, [], ssm_states, blocks)
