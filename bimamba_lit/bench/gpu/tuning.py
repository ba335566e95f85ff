"""A search around a kernel's pinned configuration: halves and doubles one number at a time while that is faster."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from bimamba_lit.bench.gpu.case import Case, Machine
from bimamba_lit.bench.gpu.timing import measure
from bimamba_lit.kernels import configurations
from bimamba_lit.kernels.configurations import Configuration, overriding

WORSE = 1.5  # times the error of the pinned configuration: such a configuration computes something else


def neighbours(start: Configuration) -> Iterator[Configuration]:
    """Yield the configurations that differ from one in one number: blocks and warps by a factor of 2, stages by 1."""
    for name, size in start.blocks.items():
        for other in (size // 2, size * 2):
            if size >= 16 and other >= 16:
                yield replace(start, blocks={**start.blocks, name: other})
    for warps in (start.num_warps // 2, start.num_warps * 2):
        if 1 <= warps <= 32:
            yield replace(start, num_warps=warps)
    for stages in (start.num_stages - 1, start.num_stages + 1):
        if 1 <= stages <= 6:
            yield replace(start, num_stages=stages)


def search(kernel: str, case: Case, at: Machine) -> Iterator[tuple[Configuration, float]]:
    """Yield ever faster configurations of a kernel and the milliseconds of a case of one call, the pinned one first."""
    best, (fastest, error) = _pinned(kernel, case, at)
    yield best, fastest
    tried = {str(best)}
    better = True
    while better:
        better = False
        for other in neighbours(best):
            if str(other) in tried:
                continue
            tried.add(str(other))
            with overriding(kernel, other):
                (row,) = measure(case, at)
            sound = row.ms is not None and (row.error is None or row.error <= WORSE * error)
            if sound and row.ms is not None and row.ms < 0.99 * fastest:
                best, fastest, better = other, row.ms, True
                yield best, fastest
                break


def launching(kernel: str, cases: Iterable[Case]) -> Case | None:
    """Return the first case with a call that takes a kernel's configuration, with that call alone; or None."""
    for case in cases:
        for by, call in case.calls.items():
            with _taken(kernel) as taken:
                call(case.inputs())
            if taken:
                return replace(case, calls={by: call})
    return None


@contextmanager
def _taken(kernel: str) -> Iterator[list[Configuration]]:
    """Note the configurations of a kernel that are taken from the table meanwhile."""
    taken: list[Configuration] = []
    look_up = configurations.matching_row

    def matching_row(kernel_name: str, itemsize: int, size: int, name: str) -> configurations.Row:
        row = look_up(kernel_name, itemsize, size, name)
        if kernel_name == kernel:
            taken.append(row.configuration)
        return row

    configurations.matching_row = matching_row  # type: ignore[assignment]
    try:
        yield taken
    finally:
        configurations.matching_row = look_up


def _pinned(kernel: str, case: Case, at: Machine) -> tuple[Configuration, tuple[float, float]]:
    """Return the configuration that the case takes from the table, its time and its error."""
    with _taken(kernel) as taken:
        (row,) = measure(case, at)
    if row.ms is None:
        raise RuntimeError(f"{case.op}, {case.shape}: {row.note}")
    return taken[0], (row.ms, row.error or float("inf"))
