"""The one table of launch configurations, and the agreement by which a test compiles every kernel that ships.

Autotuning at run time costs start-up, lets ranks disagree and makes runs differ, so configurations are pinned: by
kernel, architecture, width of the elements and a size that the kernel chooses. Tuning is a command that prints rows.

A kernel is launched as ``kernel[grid](…, **configuration("ssd/chunk_state", x.dtype, tokens, x.device).launch())``.

Every ``kernels/OP/triton.py`` has a function ``compile_cases()`` that returns `CompileCase`: each calls the launching
code (not the registered op, which would only run its fake) with tensors on the device ``"meta"``, at real shapes.
``tests/kernels/test_compile.py`` records the launches and compiles them for every architecture without a GPU, so
signatures, strides and alignment are those of real calls; and it holds every row of the table to be reached.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

# Compiled without a GPU by the test; a kernel runs elsewhere too, with the row for any architecture.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    Attributes:
        blocks: Constants of the kernel by the name of the argument, block sizes foremost; ``maxnreg`` too.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1

    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Row:
    """A configuration and where it holds; the first row that matches is taken.

    Attributes:
        configuration: What is launched.
        architectures: Names as in `ARCHITECTURES`, or ``"interpreter"``; empty for all.
        itemsize: Bytes of an element, 2 for bfloat16 and float16; None for all.
        up_to: Largest size, of what the kernel counts; None for all.
    """

    configuration: Configuration
    architectures: tuple[str, ...] = ()
    itemsize: int | None = None
    up_to: int | None = None


@dataclass(frozen=True)
class CompileCase:
    """A call that launches kernels.

    Attributes:
        name: For the test's report, for instance ``"forward bf16 with z"``.
        call: Launches on tensors of the device ``"meta"``, made inside the call.
        representative: Whether it is compiled in every run of the tests, for two architectures; keep these few, and
            fast to compile.
    """

    name: str
    call: Callable[[], object]
    representative: bool = False


TABLE: dict[str, tuple[Row, ...]] = {
    # ssd
    # The size is that of a state: head width times state size, each rounded up to a power of two.
    "ssd/chunk": (
        Row(Configuration({"Q": 64, "R": 32}), architectures=(INTERPRETER,), up_to=1 << 15),
        Row(Configuration({"Q": 32, "R": 32}), architectures=("gfx942",), itemsize=2, up_to=1 << 12),
        Row(Configuration({"Q": 64, "R": 32}), itemsize=2, up_to=1 << 12),
        Row(Configuration({"Q": 128, "R": 64}), architectures=("sm_90",), itemsize=2, up_to=1 << 13),
        Row(Configuration({"Q": 64, "R": 32}), itemsize=2, up_to=1 << 13),
        Row(Configuration({"Q": 64, "R": 32}), architectures=("sm_80", "sm_90", "sm_100"), itemsize=2, up_to=1 << 15),
        Row(Configuration({"Q": 32, "R": 32}), architectures=("sm_80", "sm_90", "gfx942"), itemsize=4, up_to=1 << 13),
    ),
    "ssd/decays": (Row(Configuration({"BLOCK_H": 16})),),
    "ssd/gate": (Row(Configuration({"BLOCK_R": 32})),),
    "ssd/scores": (
        Row(Configuration({"BLOCK_Q": 64}, 4, 1), itemsize=2),
        Row(Configuration({"BLOCK_Q": 32}, 8, 1)),
    ),
    "ssd/carry": (
        Row(Configuration({"BLOCK_P": 64, "BLOCK_N": 64}, 8, 1), architectures=("gfx942",)),
        Row(Configuration({"BLOCK_P": 64, "BLOCK_N": 64}, 8, 3), itemsize=2, up_to=1 << 12),
        Row(Configuration({"BLOCK_P": 64, "BLOCK_N": 64}, 4, 3), architectures=("sm_90",), itemsize=2, up_to=1 << 13),
        Row(Configuration({"BLOCK_P": 64, "BLOCK_N": 64}, 8, 2)),
    ),
    "ssd/walk": (Row(Configuration({"Q": 64}, 4, 2), architectures=("sm_90", INTERPRETER), itemsize=2, up_to=1 << 13),),
    "ssd/outputs": (
        Row(Configuration({"HEADS": 8}, 4, 2), itemsize=2, up_to=1 << 13),
        Row(Configuration({"HEADS": 8}, 4, 2), architectures=("gfx942",)),
        Row(Configuration({"HEADS": 8}, 8, 1), itemsize=2),
        Row(Configuration({"HEADS": 8}, 8, 2)),
    ),
    "ssd/input_gradients": (
        Row(Configuration({"HEADS": 16}, 4, 1), architectures=("gfx942",)),
        Row(Configuration({"HEADS": 8}, 4, 2), architectures=("sm_90",), itemsize=2, up_to=1 << 13),
        Row(Configuration({"HEADS": 4}, 4, 1), itemsize=2, up_to=1 << 13),
        Row(Configuration({"HEADS": 16}, 8, 1)),
    ),
    "ssd/score_gradients": (
        Row(Configuration({"HEADS": 12}, 4, 3), architectures=("sm_90",), itemsize=2, up_to=1 << 13),
        Row(Configuration({"HEADS": 16}, 4, 1), architectures=("sm_90",), itemsize=4),
        Row(Configuration({"HEADS": 16}, 4, 2)),
    ),
    "ssd/map_gradients": (
        Row(Configuration({"BLOCK_Q": 64, "BLOCK_N": 64}, 8, 1), architectures=("gfx942",), itemsize=2),
        Row(Configuration({"BLOCK_Q": 64, "BLOCK_N": 128}, 4, 3), architectures=("sm_90",), itemsize=2, up_to=1 << 13),
        Row(Configuration({"BLOCK_Q": 64, "BLOCK_N": 128}, 8, 1), itemsize=2, up_to=1 << 13),
        Row(Configuration({"BLOCK_Q": 64, "BLOCK_N": 64}, 8, 1), itemsize=2),
        Row(Configuration({"BLOCK_Q": 32, "BLOCK_N": 32}, 4, 1)),
    ),
    # the size is that of heads in all sequences
    "ssd/step": (
        Row(Configuration({"BLOCK_P": 4}, num_warps=1), up_to=512),
        Row(Configuration({"BLOCK_P": 16}, num_warps=2)),
    ),
    # selective_scan: the size is the number of channels
    "selective_scan/ends": (Row(Configuration({"BLOCK_D": 64, "T": 4}, num_warps=1)),),
    "selective_scan/forward": (Row(Configuration({"BLOCK_D": 64, "T": 4}, num_warps=1)),),
    "selective_scan/backward": (
        Row(Configuration({"BLOCK_D": 32, "T": 4, "BY_DOT": 0}), architectures=(INTERPRETER,)),
        Row(Configuration({"BLOCK_D": 64, "T": 8, "BY_DOT": 0}, num_warps=1), architectures=("gfx942",), itemsize=2),
        Row(Configuration({"BLOCK_D": 64, "T": 2, "BY_DOT": 0}, num_warps=1), architectures=("gfx942",)),
        Row(
            Configuration({"BLOCK_D": 32, "T": 16, "BY_DOT": 1}, num_warps=1),
            architectures=("sm_90", "sm_100"),
            itemsize=2,
        ),
        Row(Configuration({"BLOCK_D": 32, "T": 16, "BY_DOT": 0}, num_warps=1)),
    ),
    "selective_scan/step": (Row(Configuration({"BLOCK_D": 16}, num_warps=1)),),
    # causal_conv1d: the size is the number of channels
    "causal_conv1d/forward": (
        Row(Configuration({"BLOCK_L": 16, "BLOCK_D": 64}, num_warps=1), architectures=("sm_90",), itemsize=2),
        Row(Configuration({"BLOCK_L": 8, "BLOCK_D": 256}, num_warps=2), itemsize=2),
        Row(Configuration({"BLOCK_L": 16, "BLOCK_D": 128})),
    ),
    "causal_conv1d/backward": (
        Row(Configuration({"SPAN": 32, "BLOCK_D": 256}), architectures=(INTERPRETER,)),
        Row(Configuration({"SPAN": 64, "BLOCK_D": 256}, num_warps=4), architectures=("sm_90",), itemsize=2),
        Row(Configuration({"SPAN": 64, "BLOCK_D": 256}, num_warps=2)),
    ),
    "causal_conv1d/step": (Row(Configuration({"BLOCK_D": 64}, num_warps=1)),),
    # rms_norm: the size is the number of features of a group
    "rms_norm/forward": (
        Row(Configuration({"ROWS": 1}, num_warps=8), architectures=("sm_90",), itemsize=4, up_to=4096),
        Row(Configuration({"ROWS": 1}, num_warps=16)),
    ),
    "rms_norm/backward": (
        Row(Configuration({"ROWS": 1, "WAVES": 2}, num_warps=8), architectures=("sm_80",)),
        Row(Configuration({"ROWS": 1, "WAVES": 4}, num_warps=8), architectures=("sm_90",), itemsize=4, up_to=4096),
        Row(
            Configuration({"ROWS": 1, "WAVES": 1, "STAGES": 3}, num_warps=8),
            architectures=("sm_90",),
            itemsize=2,
            up_to=4096,
        ),
        Row(Configuration({"ROWS": 2, "WAVES": 1}, num_warps=16), up_to=4096),
        Row(Configuration({"ROWS": 1, "WAVES": 2}, num_warps=8)),
    ),
    # of the parts that programs of these wrote: the size is their number
    "sums": (Row(Configuration({"ROWS": 256, "COLUMNS": 16}, num_warps=8)),),
    # signs, binary_weight and binary_linear
    "signs/pack": (
        Row(Configuration({"ROWS": 4, "BYTES": 4}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 4, "BYTES": 32}, num_warps=4)),
    ),
    "binary_weight/forward": (
        Row(Configuration({"ROWS": 4, "BYTES": 2}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 2, "BYTES": 32}, num_warps=2)),
    ),
    "binary_weight/unpack": (
        Row(Configuration({"ROWS": 4, "BYTES": 2}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 4, "BYTES": 64}, num_warps=4)),
    ),
    "binary_weight/backward": (
        Row(Configuration({"ROWS": 4, "BYTES": 2, "TILES": 2, "STAGES": 1}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 2, "BYTES": 32, "TILES": 16, "STAGES": 3}, num_warps=2)),
    ),
    "latent_linear/pack": (
        Row(Configuration({"ROWS": 32, "COLUMNS": 64}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 32, "COLUMNS": 128}, num_warps=2)),
    ),
    "binary_linear/digits": (
        Row(Configuration({"INPUTS": 128}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"INPUTS": 4096}, num_warps=16)),
    ),
    "binary_linear/gemv_groups": (
        Row(Configuration({"ROWS": 16, "PARTS": 1, "BYTES": 32}, num_warps=2), up_to=16),
        Row(Configuration({"ROWS": 16, "PARTS": 1, "BYTES": 32}, num_warps=4)),
    ),
    "binary_linear/gemv": (
        Row(Configuration({"ROWS": 16, "PARTS": 2, "BYTES": 32}, num_warps=1), architectures=(INTERPRETER, "gfx942")),
        Row(Configuration({"ROWS": 32, "PARTS": 4, "BYTES": 64}, num_warps=4, num_stages=3)),
    ),
    "binary_linear/gemv_wide": (
        Row(Configuration({"ROWS": 16, "PARTS": 1, "BYTES": 32}, num_warps=1), architectures=(INTERPRETER, "gfx942")),
        Row(Configuration({"ROWS": 16, "PARTS": 4, "BYTES": 64}, num_warps=4, num_stages=3), up_to=16),
        Row(Configuration({"ROWS": 16, "PARTS": 4, "BYTES": 32}, num_warps=4, num_stages=3)),
    ),
    # the size is the number of words of 32 signs of a row, or that of digits
    "binary_linear/words": (
        Row(Configuration({"ROWS": 32, "CHUNK": 4}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 16, "CHUNK": 64}, num_warps=4)),
    ),
    # a program has as many threads as a row has words, or more, and no more rows; a warp has 16 words of each, or 32
    "binary_linear/counts": (
        Row(Configuration({"ROWS": 64}, num_warps=2), up_to=64),
        Row(Configuration({"ROWS": 128}, num_warps=4), up_to=80),
        Row(Configuration({"ROWS": 64}, num_warps=4), up_to=128),
        Row(Configuration({"ROWS": 64}, num_warps=8), up_to=160),
        Row(Configuration({"ROWS": 128}, num_warps=8)),
    ),
    # of two programs, with half of the 16 warps each; 256 rows are 4% faster in a chain of launches, and 8% slower
    # after a kernel that ends before the next begins
    "binary_linear/counts_pairs": (
        Row(Configuration({"ROWS": 32}, num_warps=8), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 128}, num_warps=8)),
    ),
    "binary_linear/word_digits": (
        Row(Configuration({"WORDS": 1}, num_warps=32), architectures=("sm_100",), up_to=1),
        Row(Configuration({"WORDS": 1}, num_warps=16), up_to=1),
        Row(Configuration({"WORDS": 16}, num_warps=4)),
    ),
    # operands8, gemm8: the size is the number of inputs
    "binary_linear/operands8": (
        Row(Configuration({"INPUTS": 64, "ROWS": 4, "BYTES": 2}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"INPUTS": 4096, "ROWS": 8, "BYTES": 64}, num_warps=8), up_to=4096),
        Row(Configuration({"INPUTS": 2048, "ROWS": 8, "BYTES": 64}, num_warps=4)),
    ),
    "binary_linear/gemm8": (
        Row(
            Configuration({"TOKENS": 16, "ROWS": 16, "INPUTS": 32, "NEAR": 2, "DESCRIPTORS": 0}),
            architectures=(INTERPRETER,),
        ),
        Row(
            Configuration({"TOKENS": 64, "ROWS": 64, "INPUTS": 64, "NEAR": 8, "DESCRIPTORS": 0}),
            architectures=("gfx942",),
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 128, "INPUTS": 128, "NEAR": 8, "DESCRIPTORS": 1}, 4, 3),
            architectures=("sm_90",),
            up_to=4096,
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 256, "INPUTS": 128, "NEAR": 8, "DESCRIPTORS": 1}, 8, 4),
            architectures=("sm_90",),
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 128, "INPUTS": 128, "NEAR": 8, "DESCRIPTORS": 0}, 8, 3),
            architectures=("sm_100",),
        ),
        Row(Configuration({"TOKENS": 128, "ROWS": 128, "INPUTS": 64, "NEAR": 8, "DESCRIPTORS": 0}, 8, 3)),
    ),
    # linear_rows: the size is the number of in features
    "linear_rows/rows": (
        Row(Configuration({"ROWS": 4, "BLOCK": 64}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 2, "BLOCK": 512}, num_warps=2)),
    ),
    # hopper: the size is the number of tokens, and the width that of what is multiplied; hopper_tokens: that of inputs
    "binary_linear/hopper_tokens": (
        Row(Configuration({"INPUTS": 2048}, num_warps=4), architectures=("sm_90",), up_to=2048),
        Row(Configuration({"INPUTS": 4096}, num_warps=8), architectures=("sm_90",), up_to=4096),
        Row(Configuration({"INPUTS": 8192}, num_warps=8), architectures=("sm_90",)),
    ),
    # the size is the number of inputs
    "binary_linear/hopper_rounding": (
        Row(Configuration({"TOKENS": 2, "maxnreg": 128}, num_warps=2), architectures=("sm_90",), up_to=3072),
        Row(Configuration({"TOKENS": 2}, num_warps=4), architectures=("sm_90",), up_to=6144),
        Row(Configuration({"TOKENS": 1}, num_warps=8), architectures=("sm_90",)),
    ),
    "binary_linear/hopper_rounding_few": (Row(Configuration({"TOKENS": 1}, num_warps=8), architectures=("sm_90",)),),
    "binary_linear/hopper": (
        Row(
            Configuration({"TOKENS": 32, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 8}),
            architectures=("sm_90",),
            itemsize=1,
            up_to=32,
        ),
        Row(
            Configuration({"TOKENS": 64, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 6}),
            architectures=("sm_90",),
            itemsize=1,
            up_to=64,
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 4}),
            architectures=("sm_90",),
            itemsize=1,
            up_to=256,
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 128, "WORDS": 4, "NEAR": 8, "STAGES": 4}, 8),
            architectures=("sm_90",),
            itemsize=1,
        ),
        Row(
            Configuration({"TOKENS": 32, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 6}),
            architectures=("sm_90",),
            itemsize=2,
            up_to=32,
        ),
        Row(
            Configuration({"TOKENS": 64, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 4}),
            architectures=("sm_90",),
            itemsize=2,
            up_to=64,
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 64, "WORDS": 4, "NEAR": 8, "STAGES": 3}),
            architectures=("sm_90",),
            itemsize=2,
            up_to=128,
        ),
        Row(
            Configuration({"TOKENS": 128, "ROWS": 128, "WORDS": 4, "NEAR": 8, "STAGES": 3}, 8),
            architectures=("sm_90",),
            itemsize=2,
        ),
    ),
    # hopper_many, sparse_long and sparse_wide: the size is the number of tokens; sparse_pairs: that of inputs
    "binary_linear/hopper_many": (
        Row(
            Configuration({"TOKENS": 128, "GROUPS": 3, "NEAR": 8, "STAGES": 8, "PIECE": 128, "BUFFERS": 1}),
            architectures=("sm_90",),
            itemsize=1,
        ),
    ),
    "binary_linear/sparse_long": (
        Row(
            Configuration({"TOKENS": 256, "GROUPS": 2, "NEAR": 2, "STAGES": 3, "PIECE": 32, "BUFFERS": 3}),
            architectures=("sm_90",),
            itemsize=2,
        ),
    ),
    "binary_linear/sparse_wide": (
        Row(
            Configuration({"TOKENS": 128, "GROUPS": 3, "NEAR": 4, "STAGES": 5, "PIECE": 32, "BUFFERS": 4}),
            architectures=("sm_90",),
            itemsize=2,
        ),
    ),
    "binary_linear/sparse_pairs": (
        Row(Configuration({"maxnreg": 128}, num_warps=8), architectures=("sm_90",), up_to=6144),
        Row(Configuration({"maxnreg": 128}, num_warps=16), architectures=("sm_90",)),
    ),
    "binary_linear/hopper_parts": (Row(Configuration({"TOKENS": 8, "ROWS": 128}), architectures=("sm_90",)),),
    # packed_blocks: the size is the number of words of a row, or that of a head's state
    "packed_blocks/project": (
        Row(Configuration({"ROWS": 128, "CHUNK": 4}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"ROWS": 32, "CHUNK": 32}, num_warps=4), up_to=128),
        Row(Configuration({"ROWS": 64, "CHUNK": 32}, num_warps=8)),
    ),
    # warps are rows / 16 * SPLIT; a program of `mix` has 32 rows
    "packed_blocks/project_planes": (
        Row(Configuration({"ROWS": 64, "SPLIT": 1}, num_warps=4), up_to=64),
        Row(Configuration({"ROWS": 64, "SPLIT": 1}, num_warps=4), itemsize=4, up_to=80),
        Row(Configuration({"ROWS": 32, "SPLIT": 2}, num_warps=4), up_to=256),
        Row(Configuration({"ROWS": 32, "SPLIT": 4}, num_warps=8)),
    ),
    "packed_blocks/mix_planes": (
        Row(Configuration({"SPLIT": 2}, num_warps=4), up_to=160),
        Row(Configuration({"SPLIT": 4}, num_warps=8)),
    ),
    "packed_blocks/start": (Row(Configuration({}, num_warps=4)),),
    "packed_blocks/scan": (Row(Configuration({}, num_warps=4)),),
    "packed_blocks/mix": (
        Row(Configuration({"CHUNK": 4}, num_warps=1), architectures=(INTERPRETER,)),
        Row(Configuration({"CHUNK": 64}, num_warps=8), itemsize=2),
        Row(Configuration({"CHUNK": 32}, num_warps=8)),
    ),
    # distillation_loss: the size is the vocabulary's
    "distillation_loss/rows": (
        Row(Configuration({"BLOCK": 32}), architectures=(INTERPRETER,)),
        Row(Configuration({"BLOCK": 512}, num_warps=2), up_to=4096),
        Row(Configuration({"BLOCK": 2048}, num_warps=4)),
    ),
}

_overrides: dict[str, Configuration] = {}
_target: list[str] = []


def configuration(kernel: str, dtype: torch.dtype, size: int, device: torch.device) -> Configuration:
    """Return the pinned configuration of a launch.

    Args:
        kernel: Its name in `TABLE`.
        dtype: Of the elements that decide; what counts is their width.
        size: What the kernel's rows bound with ``up_to``.
        device: Where it runs; a CPU means Triton's interpreter.

    Raises:
        LookupError: If no row matches.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return matching_row(kernel, dtype.itemsize, size, architecture(device)).configuration


def matching_row(kernel: str, itemsize: int, size: int, name: str) -> Row:
    """Return the first row of a kernel for elements of `itemsize` bytes, a size and an architecture's name."""
    for row in TABLE[kernel]:
        if (
            (not row.architectures or name in row.architectures)
            and row.itemsize in (None, itemsize)
            and (row.up_to is None or size <= row.up_to)
        ):
            return row
    raise LookupError(f"no configuration of {kernel} for {itemsize}-byte elements, size {size}, on {name}")


@contextmanager
def overriding(kernel: str, chosen: Configuration) -> Iterator[None]:
    """Launch a kernel with another configuration for a while, in every thread: for tuning."""
    before = _overrides.get(kernel)
    _overrides[kernel] = chosen
    try:
        yield
    finally:
        del _overrides[kernel]
        if before is not None:
            _overrides[kernel] = before


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Take an architecture for that of every device for a while: for compiling without it."""
    _target.append(name)
    try:
        yield
    finally:
        _target.pop()


def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture: ``"sm_90"``, ``"gfx942"`` or, off a GPU, ``"interpreter"``."""
    if _target:
        return _target[-1]
    if device.type != "cuda":
        return INTERPRETER
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def multiprocessors(device: torch.device) -> int:
    """Return how many programs of a persistent kernel fill a device; 132, an H100's, where there is none."""
    if device.type != "cuda":
        return 132
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
