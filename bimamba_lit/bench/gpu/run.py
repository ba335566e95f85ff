"""``bimamba bench gpu`` and ``bimamba bench tune``."""

import datetime
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from bimamba_lit.bench.gpu.case import Case, Chosen, Machine, Row
from bimamba_lit.bench.gpu.linear import linear_cases
from bimamba_lit.bench.gpu.models import model_cases
from bimamba_lit.bench.gpu.ops import op_cases
from bimamba_lit.bench.gpu.peers import versions
from bimamba_lit.bench.gpu.table import HEADER, markdown_line, to_csv
from bimamba_lit.bench.gpu.timing import machine, measure, release
from bimamba_lit.bench.gpu.tuning import launching, search
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing
from bimamba_lit.kernels.configurations import TABLE

OPS = (
    "ssd",
    "selective_scan",
    "conv",
    "norm",
    "steps",
    "distillation_loss",
    "gemv",
    "gemm",
    "binary_layer",
    "training",
    "decode",
)


def gpu(only: Sequence[str], out: str | None, layers: int, shapes: Sequence[str] = ()) -> None:
    """Measure on the GPU and print a Markdown table as rows come in.

    Args:
        only: Ops to measure, of `OPS`; none given, all.
        out: A folder to which ``gpu.md`` and ``gpu.csv`` are written too.
        layers: Blocks of the model in a training step, at most.
        shapes: Texts, one of which a case's shape must contain, for instance ``780M``; none given, all cases.

    Raises:
        UserError: If there is no GPU, an op is unknown, or no case is left.
    """
    for op in only:
        if op not in OPS:
            raise UserError(f"--only: there is no op '{op}'{nearest(op, OPS) or '; there are ' + ', '.join(OPS)}")
    if layers < 1:
        raise UserError(f"--layers must be at least 1, not {layers}")
    at = _machine()
    head = (
        f"{datetime.date.today()}, {at.name}, torch {torch.__version__}; {versions()}. Measured: copy "
        f"{at.copy / 1e12:.2f} TB/s, bf16 product {at.product / 1e12:.0f} TFLOP/s. CUDA graphs, cold L2.\n"
    )
    print(f"{head}\n{HEADER}", flush=True)
    rows: list[Row] = []
    for case in _cases(lambda op: not only or op in only, layers):
        if shapes and not any(text in case.shape for text in shapes):
            continue
        for row in measure(case, at):
            rows.append(row)
            print(markdown_line(row), flush=True)
        release()
        if out is not None:
            _write(Path(out), head, rows)
    if not rows:
        raise UserError(f"--shapes: no case has a shape that contains {' or '.join(shapes)}")


def tune(kernel: str, shapes: Sequence[str] = ()) -> None:
    """Search for a faster configuration of a kernel and print the row of the table that would pin it.

    Args:
        kernel: Its name in the table of configurations.
        shapes: As for `gpu`; of the cases of the kernel's op that are left the first that launches it is timed.

    Raises:
        UserError: If there is no GPU, the kernel is unknown, or no case that is left launches it.
    """
    if kernel not in TABLE:
        raise UserError(
            f"--kernel: there is no kernel '{kernel}'{nearest(kernel, TABLE) or '; see kernels/configurations.py'}"
        )
    at = _machine()
    op = case_of(kernel)
    cases = (case for case in _cases(lambda name: name == op, 1) if not shapes or any(s in case.shape for s in shapes))
    case = launching(kernel, cases)
    if case is None:
        of_shapes = f" with {' or '.join(shapes)} in its shape" if shapes else ""
        raise UserError(f"no case of {op}{of_shapes} launches {kernel} on {at.name}: try other --shapes, or none")
    (by,) = case.calls
    print(f"{kernel}, timed as {case.op}, {case.name}, {case.shape}, {by}, on {at.name}", flush=True)
    for chosen, ms in search(kernel, case, at):
        print(f"{ms:.4f} ms  {chosen}", flush=True)


def case_of(kernel: str) -> str:
    """Return the op whose case runs a kernel."""
    names = {
        "causal_conv1d": "conv",
        "rms_norm": "norm",
        "sums": "norm",
        "signs": "gemm",
        "binary_linear": "gemm" if kernel.endswith("8") or "hopper" in kernel or "sparse" in kernel else "gemv",
        "binary_weight": "binary_layer",
        "latent_linear": "binary_layer",
        "linear_rows": "decode",
        "packed_blocks": "decode",
    }
    op = kernel.split("/")[0]
    return "steps" if "step" in kernel else names.get(op, op)


def _machine() -> Machine:
    if not torch.cuda.is_available():
        raise UserError(
            "bench gpu needs a CUDA or ROCm device, and torch finds none here; `bimamba bench cpu` runs without"
        )
    return machine()


def _cases(chosen: Chosen, layers: int) -> Iterator[Case]:
    return chain(op_cases(chosen), linear_cases(chosen), model_cases(chosen, layers))


def _write(folder: Path, head: str, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join([head, HEADER, *map(markdown_line, rows)])
    for name, text in (("gpu.md", table + "\n"), ("gpu.csv", to_csv(rows))):
        with replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")
