"""The public ops: which backend is chosen, and what they say to bad input."""

import subprocess
import sys
import types
from inspect import signature

import pytest
import torch

from bimamba_lit import ops
from bimamba_lit.bench.ops_accuracy import ops_accuracy
from bimamba_lit.kernels.signs import naive
from bimamba_lit.ops import backends


def test_importing_ops_imports_no_triton_and_no_trainer():
    names = "('triton', 'lightning', 'datasets', 'transformers', 'safetensors')"
    program = f"import sys, bimamba_lit.ops; print([n for n in {names} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_name_that_a_file_shares_with_its_op_is_the_op():
    assert "bimamba_lit.ops.ssd" in sys.modules
    assert [name for name in ops.__all__ if isinstance(getattr(ops, name), types.ModuleType)] == []


def test_the_fast_forms_are_accurate():
    measured = ops_accuracy()
    rows = dict(measured)
    assert len(rows) == len(measured)
    functions = {name: op for name in ops.__all__ if isinstance(op := getattr(ops, name), types.FunctionType)}
    with_forms = {name for name, op in functions.items() if "backend" in signature(op).parameters}
    assert {name.split(":")[0].split()[0] for name in rows} == with_forms - {"pack_signs", "packed_blocks"}
    assert {name: error for name, error in rows.items() if not error <= 5e-5} == {}
    half = dict(ops_accuracy(dtype=torch.bfloat16))
    assert {name: error for name, error in half.items() if not error <= 0.03} == {}
    assert max(half.values()) > 1e-4  # the measure sees rounding


def test_a_backend_must_be_known():
    with pytest.raises(ValueError, match="backend is 'cuda', but must be one of auto, naive, chunked, triton"):
        ops.pack_signs(torch.ones(2, 8), backend="cuda")


def test_triton_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(backends, "importable", lambda module: False)
    with pytest.raises(ValueError, match="pack_signs has no Triton form"):
        ops.pack_signs(torch.ones(2, 8), backend="triton")


def test_a_triton_file_is_used_when_asked_for_and_not_for_tensors_of_a_cpu(monkeypatch):
    module = types.ModuleType("triton_form")
    module.pack_signs = lambda w: "by triton"
    monkeypatch.setattr(backends, "importable", lambda name: name == "bimamba_lit.kernels.signs.triton")
    monkeypatch.setitem(sys.modules, "bimamba_lit.kernels.signs.triton", module)
    w = torch.ones(2, 8)
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a GPU"):
        ops.pack_signs(w, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.pack_signs(w, backend="triton") == "by triton"
    assert torch.equal(ops.pack_signs(w), naive.pack_signs(w))
    with pytest.raises(ValueError, match="unpack_signs has no Triton form"):
        ops.unpack_signs(naive.pack_signs(w), 8, backend="triton")


def scan(**changes):
    inputs = {
        "x": torch.ones(2, 3, 4, 5),
        "dt": torch.ones(2, 3, 4),
        "A": -torch.ones(4),
        "B": torch.ones(2, 3, 2, 6),
        "C": torch.ones(2, 3, 2, 6),
    }
    return ops.ssd(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x has shape \(2, 3, 4\), but must be \(B, L, H, P\)"),
        ({"dt": torch.ones(2, 4, 3)}, r"dt has shape \(2, 4, 3\), but must be \(B, L, H\) = \(2, 3, 4\)"),
        ({"A": torch.ones(3)}, r"A has shape \(3,\), but must be \(H\) = \(4,\)"),
        ({"B": torch.ones(2, 3, 3, 6)}, "B has 3 groups, which must divide x's 4 heads"),
        ({"C": torch.ones(2, 3, 2, 7)}, r"C has shape \(2, 3, 2, 7\)"),
        ({"D": torch.ones(5)}, r"D has shape \(5,\), but must be \(H,\) = \(4,\) or \(H, P\) = \(4, 5\)"),
        ({"z": torch.ones(2, 3, 20)}, r"z has shape \(2, 3, 20\)"),
        ({"dt_bias": torch.ones(1)}, r"dt_bias has shape \(1,\)"),
        ({"initial_states": torch.ones(2, 4, 6, 5)}, r"initial_states has shape \(2, 4, 6, 5\)"),
        ({"seq_idx": torch.ones(3, dtype=torch.int32)}, r"seq_idx has shape \(3,\)"),
        ({"chunk_size": 0}, "must be at least 1"),
    ],
)
def test_ssd_names_what_is_wrong(changes, message):
    assert scan().shape == (2, 3, 4, 5)
    with pytest.raises(ValueError, match=message):
        scan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.ones(2, 4)}, r"u has shape \(2, 4\), but must be \(B, D, L\)"),
        ({"delta": torch.ones(2, 7, 4)}, r"delta has shape \(2, 7, 4\), but must be \(B, D, L\) = \(2, 4, 7\)"),
        ({"A": torch.ones(4)}, r"A has shape \(4,\), but must be \(D, N\)"),
        ({"A": torch.ones(3, 5)}, r"A has shape \(3, 5\), but must be \(D, N\) = \(4, 5\)"),
        ({"B": torch.ones(2, 6, 7)}, r"B has shape \(2, 6, 7\), but must be \(B, N, L\) = \(2, 5, 7\)"),
        ({"C": torch.ones(2, 3, 5, 7)}, "C has 3 groups, which must divide u's 4 channels"),
        ({"C": torch.ones(2, 2, 5, 8)}, r"C has shape .* = \(2, 2, 5, 7\)"),
        ({"B": torch.ones(2, 5)}, r"B has shape \(2, 5\), but must be \(B, G, N, L\)"),
        ({"D": torch.ones(5)}, r"D has shape \(5,\), but must be \(D\) = \(4,\)"),
        ({"z": torch.ones(2, 4, 6)}, r"z has shape \(2, 4, 6\)"),
        ({"delta_bias": torch.ones(1)}, r"delta_bias has shape \(1,\)"),
        ({"initial_states": torch.ones(2, 5, 4)}, r"initial_states has shape .* = \(2, 4, 5\)"),
        ({"seq_idx": torch.ones(7)}, r"seq_idx has shape \(7,\)"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_selective_scan_names_what_is_wrong(changes, message):
    inputs = {
        "u": torch.ones(2, 4, 7),
        "delta": torch.ones(2, 4, 7),
        "A": -torch.ones(4, 5),
        "B": torch.ones(2, 5, 7),
        "C": torch.ones(2, 2, 5, 7),
    }
    assert ops.selective_scan(**inputs).shape == (2, 4, 7)
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 9)}, r"x has shape \(4, 9\), but must be \(B, D, L\)"),
        ({"weight": torch.ones(4, 1, 3)}, r"weight has shape \(4, 1, 3\), but must be \(D, W\)"),
        ({"weight": torch.ones(5, 3)}, r"weight has shape \(5, 3\), but must be \(D, W\) = \(4, 3\)"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\)"),
        ({"initial_states": torch.ones(2, 4, 3)}, r"initial_states has shape .* = \(2, 4, 2\)"),
        ({"seq_idx": torch.ones(2, 4)}, r"seq_idx has shape"),
        ({"activation": "gelu"}, "activation is 'gelu', but must be None, 'silu' or 'swish'"),
    ],
)
def test_causal_conv1d_names_what_is_wrong(changes, message):
    inputs = {"x": torch.ones(2, 4, 9), "weight": torch.ones(4, 3)}
    assert ops.causal_conv1d(**inputs).shape == (2, 4, 9)
    with pytest.raises(ValueError, match=message):
        ops.causal_conv1d(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projected": torch.ones(2, 31)}, r"projected has shape \(2, 31\), but must be \(B, L, Z\)"),
        ({"projected": torch.ones(2, 3, 29)}, r"projected has shape .* \(B, L, I\+K\+H\) = \(2, 3, 30\)"),
        ({"projected": torch.ones(2, 0, 30)}, "length, chunk_size and taps must be at least 1, and are 0, 256 and 4"),
        ({"conv_weight": torch.ones(18, 0)}, "length, chunk_size and taps must be at least 1, and are 3, 256 and 0"),
        ({"groups": 3}, "groups is 3, which must divide 4 heads, and these 8 inner features"),
        ({"A": torch.ones(3)}, "groups is 1, which must divide 3 heads, and these 8 inner features"),
        ({"conv_weight": torch.ones(8, 4)}, "conv_weight has 8 channels, but must have 8 and twice as many as B has"),
        ({"conv_bias": torch.ones(8)}, r"conv_bias has shape \(8,\), but must be \(K\) = \(18,\)"),
        ({"D": torch.ones(4, 2)}, r"D has shape \(4, 2\)"),
        ({"dt_bias": torch.ones(1)}, r"dt_bias has shape \(1,\)"),
        ({"seq_idx": torch.ones(3)}, r"seq_idx has shape \(3,\)"),
        ({"mask": torch.ones(2, 4)}, r"mask has shape \(2, 4\)"),
    ],
)
def test_conv_ssd_norm_names_what_is_wrong(changes, message):
    inputs = {
        "projected": torch.ones(2, 3, 30),
        "conv_weight": torch.ones(18, 4),
        "conv_bias": torch.ones(18),
        "A": -torch.ones(4),
        "D": torch.ones(4),
        "dt_bias": torch.ones(4),
        "norm_weight": torch.ones(8),
    }
    assert ops.conv_ssd_norm(**inputs).shape == (2, 3, 8)
    with pytest.raises(ValueError, match=message):
        ops.conv_ssd_norm(**{**inputs, **changes})


def test_steps_name_what_is_wrong():
    state, x, dt, A, B = (
        torch.ones(2, 4, 5, 6),
        torch.ones(2, 4, 5),
        torch.ones(2, 4),
        torch.ones(4),
        torch.ones(2, 1, 6),
    )
    with pytest.raises(ValueError, match=r"state has shape .*, but must be \(B, H, P, N\) = \(2, 4, 5, 6\)"):
        ops.ssd_step(state[:1], x, dt, A, B, B)
    with pytest.raises(ValueError, match=r"conv_state has shape .*, but must be \(B, D, W-1\) = \(2, 4, 2\)"):
        ops.causal_conv1d_step(torch.ones(2, 4), torch.ones(2, 4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 0\), but must have at least one tap"):
        ops.causal_conv1d_step(torch.ones(2, 4), torch.ones(2, 4, 0), torch.ones(4, 0))
    u, rates, maps = torch.ones(2, 4), torch.ones(4, 6), torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"state has shape .*, but must be \(B, D, N\) = \(2, 4, 6\)"):
        ops.selective_scan_step(state, u, u, rates, maps, maps)
    with pytest.raises(ValueError, match=r"C has shape \(6,\), but must be \(B, G, N\)"):
        ops.selective_scan_step(torch.ones(2, 4, 6), u, u, rates, maps, maps[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, 9)}, ValueError, r"x has shape \(3, 9\), but must be \(\.\.\., I\) = \(\.\.\., 10\)"),
        ({"signs": torch.ones(4, 2)}, TypeError, "signs has dtype torch.float32, but must be torch.uint8"),
        ({"in_features": 17}, ValueError, r"signs has shape \(4, 2\), but must be \(O, ceil\(I/8\)\) = \(4, 3\)"),
        ({"in_scale": torch.ones(4)}, ValueError, r"in_scale has shape \(4,\), but must be \(I,\) = \(10,\) or \(1,\)"),
        ({"out_shift": torch.ones(4, 1)}, ValueError, r"out_shift has shape \(4, 1\), but must be \(O,\) = \(4,\)"),
        ({"group_scale": torch.ones(5, 2)}, ValueError, r"group_scale has shape \(5, 2\), but must be .* \(4, 2\)"),
        ({"group_scale": torch.ones(4, 3)}, ValueError, "group_scale has 3 groups, which must divide in_features = 10"),
    ],
)
def test_binary_linear_names_what_is_wrong(changes, error, message):
    inputs = {"x": torch.ones(3, 10), "signs": torch.zeros(4, 2, dtype=torch.uint8), "in_features": 10}
    assert ops.binary_linear(**inputs).shape == (3, 4)
    with pytest.raises(error, match=message):
        ops.binary_linear(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_t": torch.ones(8, 5)}, ValueError, r"head_t has shape \(8, 5\), but must be \(V, D\) = \(7, 5\)"),
        ({"head_s": torch.ones(7, 5)}, ValueError, r"head_s has shape \(7, 5\), but must be \(V, D\) = \(7, 4\)"),
        ({"hidden_t": torch.ones(3, 5)}, ValueError, r"hidden_t has shape \(3, 5\)"),
        ({"hidden_t": torch.tensor(1.0)}, ValueError, r"hidden_t has shape \(\), but must be"),
        ({"labels": torch.ones(2, 3)}, TypeError, "labels has dtype torch.float32, but must be of an integer dtype"),
        ({"hidden_t": None}, ValueError, "hidden_t and head_t are needed at hard_share = 0.0, or set hard_share = 1.0"),
        ({"hard_share": 0.5}, ValueError, "labels are needed at hard_share = 0.5"),
        ({"hard_share": 1.5}, ValueError, "hard_share is 1.5, but must be between 0 and 1"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, but must be positive and finite"),
        ({"divergence": "kl"}, ValueError, "divergence is 'kl', but must be one of soft_ce, forward_kl, reverse_kl"),
        ({"labels": torch.full((2, 3), 7)}, ValueError, "labels hold a value outside 0 to 6 that is not -100"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels has shape \(3,\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask has dtype torch.float32, but must be torch.bool"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0, but must be at least 1"),
    ],
)
def test_distillation_loss_names_what_is_wrong(changes, error, message):
    inputs = {
        "hidden_s": torch.ones(2, 3, 4),
        "head_s": torch.ones(7, 4),
        "hidden_t": torch.ones(2, 3, 5),
        "head_t": torch.ones(7, 5),
    }
    assert ops.distillation_loss(**inputs).shape == ()
    with pytest.raises(error, match=message):
        ops.distillation_loss(**{**inputs, **changes})


def test_topk_distillation_loss_names_what_is_wrong():
    student, head, ids, rest = torch.ones(2, 3, 4), torch.ones(7, 4), torch.zeros(2, 3, 1), torch.zeros(2, 3, 2)
    with pytest.raises(TypeError, match="top_ids has dtype torch.float32, but must be of an integer dtype"):
        ops.topk_distillation_loss(student, head, ids, rest)
    with pytest.raises(ValueError, match=r"top_ids has shape \(\), but must be"):
        ops.topk_distillation_loss(student, head, torch.tensor(1), rest)


def empty_scans():
    """Scans of no sequences at all, with a gradient wanted."""
    x, A = torch.empty(0, 5, 4, 8, requires_grad=True), -torch.ones(4)
    dt, maps = torch.empty(0, 5, 4), torch.empty(0, 5, 2, 6)
    yield x, (0, 4, 8, 6), lambda: ops.ssd(x, dt, A, maps, maps, return_final_states=True)
    u, maps = torch.empty(0, 4, 5, requires_grad=True), torch.empty(0, 3, 5)
    yield u, (0, 4, 3), lambda: ops.selective_scan(u, u, -torch.ones(4, 3), maps, maps, return_last_state=True)
    projected = torch.empty(0, 3, 30, requires_grad=True)
    rest = torch.ones(18, 4), torch.ones(18), A, A, A, torch.ones(8)
    yield projected, None, lambda: (ops.conv_ssd_norm(projected, *rest), None)


def test_an_empty_batch_is_scanned():
    for inputs, state_shape, scanned in empty_scans():
        y, state = scanned()
        assert len(y) == 0 and (state is None or state.shape == state_shape)
        y.sum().backward()
        assert inputs.grad.shape == inputs.shape


def test_integers_in_place_of_floats_are_refused_and_the_other_way_round():
    whole, rates = torch.ones(2, 4, 7, dtype=torch.int64), -torch.ones(4, 5)
    maps, signs = torch.ones(2, 5, 7), torch.zeros(4, 1, dtype=torch.uint8)
    for name, run in {
        "x": lambda: scan(x=torch.ones(2, 3, 4, 5, dtype=torch.int32)),
        "u": lambda: ops.selective_scan(whole, whole, rates, maps, maps),
        "latent": lambda: ops.binary_weight(whole[0]),
    }.items():
        with pytest.raises(TypeError, match=f"{name} has dtype torch.int.*, but must be of a float dtype"):
            run()
    for run in (
        lambda: ops.causal_conv1d(whole, torch.ones(4, 3)),
        lambda: ops.rms_norm(whole, torch.ones(7)),
        lambda: ops.binary_linear(whole, signs, 7),
    ):
        with pytest.raises(TypeError, match="x has dtype torch.int64, but must be of a float dtype"):
            run()
    with pytest.raises(TypeError, match="seq_idx has dtype torch.float32, but must be of an integer dtype"):
        scan(seq_idx=torch.ones(2, 3))
