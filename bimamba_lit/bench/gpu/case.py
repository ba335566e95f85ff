"""What is measured: a case, the calls that compete in it, and the least work any of them must do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = dict[str, Any]
Chosen = Callable[[str], bool]
Call = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Work:
    """The least a call must do: inputs read once, outputs written once, products of the definition.

    Attributes:
        bytes: Moved to or from memory.
        flops: Floating-point operations of matrix products.
    """

    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Machine:
    """What the machine at hand was measured to do.

    Attributes:
        name: Of the GPU.
        copy: Bytes a second, read and written, of a copy of 1 GiB.
        product: Floating-point operations a second of a bfloat16 product of 8192 x 8192 matrices.
    """

    name: str
    copy: float
    product: float

    def floor_ms(self, work: Work) -> float:
        """Return the milliseconds below which no call can do the work."""
        return 1000 * max(work.bytes / self.copy, work.flops / self.product)


@dataclass(frozen=True)
class Case:
    """Calls that compute the same, on the same inputs.

    Attributes:
        op: What ``--only`` chooses by.
        name: What of the op, for instance ``"forward"``.
        shape: In words.
        inputs: Makes one set of inputs on the GPU; sets take turns so that the L2 cache is cold.
        calls: By the name of who makes it; each takes a set and returns its outputs. This project's are first.
        work: The least work, or None where no floor is meaningful.
        right: Outputs to measure errors by; None where there are none.
        rotate: Whether sets take turns; not where one set fills the cache many times over.
        resident: Whether all memory on the device counts, models and states included, and not what a call adds.
    """

    op: str
    name: str
    shape: str
    inputs: Callable[[], Inputs]
    calls: dict[str, Call]
    work: Work | None = None
    right: Call | None = None
    rotate: bool = True
    resident: bool = False


@dataclass(frozen=True)
class Row:
    """What came out for one call of a case; NaN and None where it could not be measured.

    Attributes:
        op: As in `Case`.
        name: As in `Case`.
        shape: As in `Case`.
        by: Who made the call.
        ms: Milliseconds of one call.
        floor_ms: The least possible, or None.
        error: The largest ratio of RMS errors among the outputs, or None.
        peak_mb: Memory of a call beside its inputs or, of a resident case, of everything; in 10^6 bytes.
        first_s: Seconds of the first call, compiling and tuning included.
        graph: Whether it was timed as a CUDA graph.
        note: Why it was not measured, or nothing.
    """

    op: str
    name: str
    shape: str
    by: str
    ms: float | None = None
    floor_ms: float | None = None
    error: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    graph: bool = False
    note: str = ""

    @property
    def share(self) -> float | None:
        """The floor over the time: 1 is as fast as the machine can."""
        return None if self.ms is None or self.floor_ms is None else self.floor_ms / self.ms


def tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors among a call's outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Iterable):
        return [t for output in outputs for t in tensors(output)]
    return []
