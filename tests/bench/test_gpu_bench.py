"""The GPU benchmark without a GPU: floors, tables, choices and errors, and every call at small shapes on the CPU."""

import csv
import io
import math

import pytest
import torch

from bimamba_lit.bench.gpu import run, shapes, timing
from bimamba_lit.bench.gpu.case import Case, Machine, Row, Work, tensors
from bimamba_lit.bench.gpu.linear import linear_cases
from bimamba_lit.bench.gpu.models import model_cases
from bimamba_lit.bench.gpu.ops import op_cases
from bimamba_lit.bench.gpu.table import HEADER, markdown_line, to_csv
from bimamba_lit.bench.gpu.tuning import launching, neighbours, search
from bimamba_lit.kernels import configurations
from bimamba_lit.kernels.configurations import Configuration, configuration

H200 = Machine("H200", 4.3e12, 790e12)


@pytest.mark.parametrize(
    ("model", "forward", "backward"), list(zip(shapes.MODELS, [50, 66, 82], [116, 154, 192], strict=True))
)
def test_floors_of_ssd_are_those_of_the_published_counts(model, forward, backward):
    works = model.scan()
    assert [H200.floor_ms(work) * 1000 for work in works] == pytest.approx([forward, backward], rel=0.02)
    assert works[0].flops == pytest.approx({48: 39.2e9, 64: 52.1e9, 80: 65.0e9}[model.heads], rel=0.01)


def test_projections_have_the_published_shapes():
    found = {model.name: model.projections for model in shapes.MODELS}
    assert found == {
        "780M": ((1536, 6448), (3072, 1536)),
        "1.3B": ((2048, 8512), (4096, 2048)),
        "2.7B": ((2560, 10576), (5120, 2560)),
    }


def test_many_tokens_are_measured_at_the_shapes_that_the_readme_tells():
    found = [(case.name, case.shape) for case in linear_cases(lambda op: op == "gemm")]
    assert ("64 tokens", "8192^2: 8192 x 8192") in found
    assert ("2048 tokens", "780M out_proj: 3072 x 1536") in found
    assert ("16384 tokens", "2.7B in_proj: 2560 x 10576") in found
    assert len(found) == len(set(found)) == 5 * 7


@pytest.fixture
def small(monkeypatch):
    """Shapes for the CPU."""
    for name, value in {
        "DEVICE": "cpu",
        "MODELS": (shapes.Model("tiny", 64, 2),),
        "BATCH": 2,
        "LENGTH": 16,
        "TOKENS": 32,
        "CHUNK": 16,
        "HEAD": 16,
        "STATE": 16,
        "VOCABULARY": 40,
    }.items():
        monkeypatch.setattr(shapes, name, value)


def cases(*only):
    def chosen(op):
        return op in only

    yield from op_cases(chosen)
    yield from linear_cases(chosen)
    yield from model_cases(chosen, 1)


@pytest.mark.parametrize("op", [op for op in run.OPS if op != "gemv"])
def test_every_call_of_a_case_agrees_with_what_is_right(op, small, monkeypatch):
    monkeypatch.setattr("bimamba_lit.bench.gpu.linear.MANY", (4,))
    monkeypatch.setattr("bimamba_lit.bench.gpu.ops.WIDTHS", (16,))
    monkeypatch.setattr("bimamba_lit.bench.gpu.ops.CHANNELS", 16)
    count = 0
    for case in cases(op):
        assert case.op == op
        right = None if case.right is None else [t.detach() for t in tensors(case.right(case_inputs(case)))]
        for call in case.calls.values():
            found = tensors(call(case_inputs(case)))
            assert all(torch.isfinite(t).all() for t in found)
            assert right is None or timing.error_of(found, right) < 0.02
            count += 1
    assert count


def case_inputs(case):
    torch.manual_seed(0)
    return case.inputs()


def test_decoding_goes_on_from_the_state_before(small):
    case = next(cases("decode"))
    (call,) = case.calls.values()
    given = case.inputs()
    assert not torch.equal(call(given), call(given))


def test_errors_are_ratios_of_rms():
    right = [torch.ones(4), torch.tensor([3.0, 4.0])]
    assert timing.error_of([torch.ones(4), torch.tensor([3.0, 4.5])], right) == pytest.approx(0.1)


ROWS = [
    Row("ssd", "forward", "780M: 48 heads", "bimamba-lit", 0.2, 0.05, 0.003, 123.4, 1.5, True),
    Row("ssd", "forward", "780M: 48 heads", "peer", None, 0.05, note="OutOfMemoryError: a | b"),
    Row("decode", "1 token", "780M", "bimamba-lit", 12.0, None, None, 300.0, 2.0, False),
]


def test_the_markdown_table():
    width = HEADER.splitlines()[0].count("|")
    lines = [markdown_line(row) for row in ROWS]
    assert all(line.count("|") == width for line in lines)
    assert lines[0].split(" | ")[4:9] == ["0.200", "0.0500", "25%", "3.0e-03", "123"]
    assert "OutOfMemoryError: a / b" in lines[1]
    assert "12.0 (eager)" in lines[2]


def test_the_csv():
    rows = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert float(rows[0]["share"]) == 0.25 and rows[1]["share"] == "" and rows[2]["graph"] == "False"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpu"], "needs a CUDA or ROCm device"),
        (["gpu", "--only", "sdd"], "there is no op 'sdd'; did you mean 'ssd'?"),
        (["gpu", "--layers", "0"], "--layers must be at least 1"),
        (["tune"], "bench tune needs --kernel"),
        (["tune", "--kernel", "distillation_loss/row"], "did you mean 'distillation_loss/rows'?"),
        (["tune", "--kernel", "distillation_loss/rows"], "needs a CUDA or ROCm device"),
    ],
)
def test_errors_are_sentences(arguments, sentence, bimamba, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = bimamba("bench", *arguments)
    assert answer.code == 1 and sentence in answer.err and "Traceback" not in answer.err


@pytest.fixture
def measured(monkeypatch, small):
    """Measures nothing: every call takes a millisecond."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "machine", lambda: H200)
    monkeypatch.setattr(
        run, "measure", lambda case, at: [Row(case.op, case.name, case.shape, by, 1.0) for by in case.calls]
    )


def test_only_the_chosen_are_measured_and_written(measured, bimamba, tmp_path):
    answer = bimamba("bench", "gpu", "--only", "ssd", "conv", "--shapes", "tiny", "--out", tmp_path / "new")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "gpu.csv").read_text())))
    assert {row["op"] for row in rows} == {"ssd", "conv"}
    table = (tmp_path / "new" / "gpu.md").read_text()
    assert table.strip() in answer.out and "H200" in table


def test_no_case_of_a_shape_is_an_error(measured, bimamba):
    answer = bimamba("bench", "gpu", "--only", "ssd", "--shapes", "7B")
    assert answer.code == 1 and "no case has a shape that contains 7B" in answer.err


def test_every_kernel_has_a_case_that_is_timed_when_it_is_tuned():
    assert {run.case_of(kernel) for kernel in configurations.TABLE} <= set(run.OPS)
    many = ("gemm8", "hopper_many", "sparse_pairs", "sparse_long")
    assert {run.case_of(f"binary_linear/{kernel}") for kernel in many} == {"gemm"}
    assert {run.case_of(f"binary_linear/{kernel}") for kernel in ("gemv", "counts", "digits")} == {"gemv"}


def test_neighbours_differ_in_one_number():
    start = Configuration({"M": 16, "N": 64}, num_warps=4, num_stages=1)
    found = [(other.blocks["M"], other.blocks["N"], other.num_warps, other.num_stages) for other in neighbours(start)]
    assert found == [(32, 64, 4, 1), (16, 32, 4, 1), (16, 128, 4, 1), (16, 64, 2, 1), (16, 64, 8, 1), (16, 64, 4, 2)]


def test_a_kernel_is_tuned_by_a_call_that_launches_it(monkeypatch):
    monkeypatch.setattr(configurations, "TABLE", {"op/k": (configurations.Row(Configuration({"M": 64})),)})

    def launch(given):
        configuration("op/k", torch.float32, 1, torch.device("cpu"))

    few = Case("op", "few", "s", dict, {"us": lambda given: None, "us, 8 bits": lambda given: None})
    many = Case("op", "many", "s", dict, {"us": lambda given: None, "us, 8 bits": launch, "peer": launch})
    found = launching("op/k", [few, many])
    assert found.name == "many" and list(found.calls) == ["us, 8 bits"]
    assert launching("op/k", [few]) is None


def test_no_case_that_launches_a_kernel_is_an_error(measured, bimamba, monkeypatch):
    monkeypatch.setattr(run, "launching", lambda kernel, cases: None)
    answer = bimamba("bench", "tune", "--kernel", "binary_linear/counts", "--shapes", "7B")
    assert (
        answer.code == 1 and "no case of gemv with 7B in its shape launches binary_linear/counts on H200" in answer.err
    )


def test_the_search_ends_at_the_fastest_that_is_right(monkeypatch):
    """A valley with its floor at 256 and 8 warps; beyond 256, results are wrong and times better."""
    monkeypatch.setattr(configurations, "TABLE", {"op/k": (configurations.Row(Configuration({"M": 64})),)})

    def measure(case, at):
        chosen = configuration("op/k", torch.float32, 1, torch.device("cpu"))
        distance = abs(math.log2(chosen.blocks["M"] / 256)) + abs(math.log2(chosen.num_warps / 8))
        wrong = chosen.blocks["M"] > 256
        return [Row("op", "k", "s", "us", 0.1 if wrong else 1 + distance + chosen.num_stages, error=wrong + 0.01)]

    monkeypatch.setattr("bimamba_lit.bench.gpu.tuning.measure", measure)
    case = Case("op", "k", "s", dict, {"us": lambda given: None}, Work(1))
    found = list(search("op/k", case, H200))
    assert [ms for _, ms in found] == sorted((ms for _, ms in found), reverse=True)
    assert found[-1][0] == Configuration({"M": 256}, num_warps=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")
def test_a_table_on_a_gpu(bimamba, tmp_path):
    answer = bimamba("bench", "gpu", "--only", "norm", "gemv", "--shapes", "780M", "--out", tmp_path)
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "gpu.csv").read_text())))
    ours = [row for row in rows if row["by"] == "bimamba-lit"]
    assert ours and all(float(row["ms"]) > 0 and float(row["error"]) < 0.01 and not row["note"] for row in ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_that_cannot_be_captured_spoils_no_other():
    def inputs():
        return {"x": torch.rand(8, device="cuda")}

    calls = {"waits": lambda given: given["x"] * given["x"].sum().item(), "fails": lambda given: 1 // 0}
    case = Case("op", "name", "shape", inputs, {**calls, "plain": lambda given: given["x"] * 2})
    for _ in range(2):
        waits, fails, plain = timing.measure(case, H200)
        assert waits.ms > 0 and not waits.graph and not waits.note
        assert fails.ms is None and "ZeroDivisionError" in fails.note
        assert plain.ms > 0 and plain.graph
        assert (
            torch.cuda.current_stream() == torch.cuda.default_stream()
            and torch.rand(8, device="cuda").unique().numel() > 1
        )
