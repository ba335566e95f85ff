"""Every kernel compiles without a GPU for every architecture it ships for, and is sound there.

Sound: no register spilled, shared memory within a block's limit, and on Hopper no product whose left operand lies in
registers while earlier products may still be running (triton #9433, in Triton up to 3.6): in PTX, a ``wgmma`` with two
register lists in a kernel that waits for fewer than all groups. Where a kernel writes an instruction of a warp itself,
its tensors have one element a thread, in order.
"""

import importlib
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import bimamba_lit
from bimamba_lit.kernels import configurations
from bimamba_lit.kernels.configurations import ARCHITECTURES, TABLE, compiling_for

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
jit = importlib.import_module("triton.runtime.jit")
gluon = importlib.import_module("triton.experimental.gluon._runtime")
HOPPER = importlib.import_module("bimamba_lit.kernels.binary_linear.triton").HOPPER
if triton.knobs.runtime.interpret:
    pytest.skip("compiles nothing in the interpreter", allow_module_level=True)

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
SPILLS = 0 if triton.__version__.startswith("3.7.") else 64  # bytes; configurations are chosen with that version
REGISTER_LEFT = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{")
WAIT_FOR_SOME = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]")
ONE_A_THREAD = "#ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{}], order = [0]{}}}>"
OF_TWO_PROGRAMS = ", CGALayout = [[1]]"
MODULES = sorted(
    f"bimamba_lit.kernels.{path.parent.name}.triton"
    for path in (Path(bimamba_lit.__file__).parent / "kernels").resolve().glob("*/triton.py")
)


def target(architecture):
    gpu = importlib.import_module("triton.backends.compiler").GPUTarget
    if architecture.startswith("sm_"):
        return gpu("cuda", int(architecture.removeprefix("sm_")), 32)
    return gpu("hip", architecture, 64)


@contextmanager
def recording(monkeypatch):
    """Record launches, as (kernel, arguments by position, by name), instead of running them."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", record)
        yield launches


def compiled(kernel, args, kwargs, architecture):
    """Compile a launch as Triton would on a device of that architecture."""
    backend = triton.compiler.make_backend(target(architecture))
    kwargs = {**kwargs, "debug": False}
    bound, specialization, options = jit.create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    kind = gluon.GluonASTSource if kernel.is_gluon() else triton.compiler.ASTSource
    source = kind(kernel, signature, constants, attributes)
    return triton.compile(source, target=target(architecture), options=options.__dict__)


def faults(binary, architecture):
    """Return what is wrong with a compiled kernel, in words."""
    found = []
    if binary.metadata.shared > SHARED_LIMIT[architecture]:
        found.append(f"{binary.metadata.shared} bytes of shared memory, over {SHARED_LIMIT[architecture]}")
    if not 0 <= (spilled := spills(binary, architecture)) <= SPILLS:
        found.append(f"spills: {spilled}")
    ptx = binary.asm.get("ptx", "")
    if architecture == "sm_90" and REGISTER_LEFT.search(ptx) and WAIT_FOR_SOME.search(ptx):
        found.append("a product's left operand in registers while earlier products may be running")
    return found


def spills(binary, architecture):
    """Return bytes of stack a thread uses (Triton has no other use of a stack), or spilled registers on AMD."""
    if not architecture.startswith("sm_"):
        return sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", binary.asm["amdgcn"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(count) for count in re.findall(r"STACK:(\d+)", usage) or ["-1"])


def places(binary):
    """Return how tensors lie whose elements an instruction takes as those of threads."""
    text = binary.asm.get("ttgir", "")
    used = [line for line in text.splitlines() if "inline_asm" in line and ".sync" in line]
    return {
        re.search(rf"^{layout} = (.*)$", text, re.MULTILINE)[1]
        for line in used
        for layout in re.findall(r"tensor<\d+xi32, (#\w+)>", line)
    }


def cases():
    for module in MODULES:
        for case in importlib.import_module(module).compile_cases():
            for architecture in ARCHITECTURES:
                quick = case.representative and architecture in ("sm_80", "sm_90")
                yield pytest.param(
                    case,
                    architecture,
                    id=f"{module.split('.')[-2]}-{case.name}-{architecture}",
                    marks=() if quick else pytest.mark.slow,
                )


@pytest.mark.parametrize(("case", "architecture"), list(cases()))
def test_kernels_compile_and_are_sound(case, architecture, monkeypatch):
    with recording(monkeypatch) as launches, compiling_for(architecture):
        try:
            case.call()
        except LookupError as error:
            pytest.skip(str(error))
    assert launches, "the case launches no kernel"
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, architecture)
        assert not faults(binary, architecture), f"{kernel.__name__} {kwargs}"
        programs = OF_TWO_PROGRAMS if kwargs.get("num_ctas") == 2 else ""
        assert places(binary) <= {ONE_A_THREAD.format(kwargs["num_warps"], programs)}, f"{kernel.__name__} {kwargs}"


@pytest.mark.skipif(not HOPPER, reason="Hopper's kernels are not taken with this Triton")
def test_every_row_of_the_table_is_compiled(monkeypatch):
    reached = []

    def matching_row(kernel, *where):
        reached.append(row := looked_up(kernel, *where))
        return row

    looked_up = configurations.matching_row
    monkeypatch.setattr(configurations, "matching_row", matching_row)
    for architecture in ARCHITECTURES:
        for module in MODULES:
            for case in importlib.import_module(module).compile_cases():
                with recording(monkeypatch), compiling_for(architecture):
                    try:
                        case.call()
                    except LookupError:
                        continue
    missed = [
        (kernel, row)
        for kernel, rows in TABLE.items()
        for row in rows
        if row.architectures != (configurations.INTERPRETER,) and not any(row is other for other in reached)
    ]
    assert not missed, "no compile case reaches these rows"


@triton.jit
def from_lane(x, pairs: tl.constexpr):
    """Ask lanes for what others have, with one element a thread, or two."""
    i = tl.arange(0, 128 * pairs)
    value = tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [tl.load(x + i), i % 32], tl.int32, True, 1
    )
    tl.store(x + i, value)


@pytest.mark.parametrize("pairs", [1, 2])
def test_elements_that_lie_otherwise_are_seen(pairs):
    x = torch.empty(256, dtype=torch.int32, device="meta")
    binary = compiled(from_lane, (x,), {"pairs": pairs, "num_warps": 4}, "sm_80")
    assert (places(binary) == {ONE_A_THREAD.format(4, "")}) == (pairs == 1)


@triton.jit
def greedy(x, y, n: tl.constexpr, stages: tl.constexpr):
    """Multiply with the left operand in registers, as many stages as asked for."""
    offsets = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    total = tl.zeros((n, n), tl.float32)
    for step in tl.range(0, 32, num_stages=stages):
        left = tl.exp(tl.load(x + step * n * n + offsets).to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(left, tl.load(y + step * n * n + offsets), total)
    tl.store(x + offsets, total.to(tl.bfloat16))


def greedy_faults(architecture, **options):
    tensor = torch.empty(32 * 128 * 128, dtype=torch.bfloat16, device="meta")
    return " ".join(faults(compiled(greedy, (tensor, tensor), options, architecture), architecture))


def test_a_kernel_that_is_sound_has_no_faults():
    assert greedy_faults("sm_90", n=64, stages=1, num_warps=4) == ""


@pytest.mark.parametrize(
    ("fault", "architecture", "options"),
    [
        ("spills", "sm_80", {"n": 128, "stages": 1, "num_warps": 4, "maxnreg": 64}),
        ("shared memory", "sm_90", {"n": 128, "stages": 5, "num_warps": 8}),
        ("left operand in registers", "sm_90", {"n": 64, "stages": 3, "num_warps": 4}),
    ],
)
def test_faults_are_found(fault, architecture, options):
    assert fault in greedy_faults(architecture, **options)
