"""Timing on a GPU: CUDA graphs, a cold L2 cache, the first call apart, and turns.

The calls of a case are timed in turns, replay by replay: a GPU at its power limit changes its clock by a tenth within
tenths of a second, and whoever is timed first, while it is cool, would look faster than it is.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bimamba_lit.bench.gpu.case import Call, Case, Inputs, Machine, Row, tensors

COLD_BYTES = 240e6  # more than any GPU's L2 cache several times over
MAX_SETS = 256
LONG_ENOUGH_MS = 60.0
MAX_REPLAYS = 50


def machine() -> Machine:
    """Measure the GPU at hand."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (copied,) = _in_turns([partial(target.copy_, source)])
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    (multiplied,) = _in_turns([lambda: a @ b])
    return Machine(torch.cuda.get_device_name(), 2 * 2**30 / copied * 1e3, 2 * 8192**3 / multiplied * 1e3)


def measure(case: Case, at: Machine) -> list[Row]:
    """Run every call of a case and return its rows; a call that fails has a note instead of a time."""
    floor = None if case.work is None else at.floor_ms(case.work)
    first = _fresh(case)
    sets = [first]
    if case.rotate:
        # What a call reads, not all that peers need beside it: a packed weight is a sixteenth of a dense one.
        read = _bytes(first) if case.work is None else min(case.work.bytes, _bytes(first))
        count = min(MAX_SETS, int(COLD_BYTES // max(read, 1)) + 1)
        sets += [case.inputs() for _ in range(count - 1)]
    right = None if case.right is None else [t.detach() for t in tensors(case.right(first))]
    rows, runs = [], {}
    for index, (by, call) in enumerate(case.calls.items()):
        try:
            row, runs[index] = _row(case, by, call, sets, right, floor)
        except Exception as error:  # a peer's failure, or memory, must not end the run
            note = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            row = Row(case.op, case.name, case.shape, by, floor_ms=floor, note=note)
        rows.append(row)
        release()
    for index, ms in zip(runs, _in_turns(list(runs.values())), strict=True):
        rows[index] = replace(rows[index], ms=ms / len(sets))
    runs.clear()
    release()
    return rows


def _fresh(case: Case) -> Inputs:
    """Return inputs that are the same every time: a call may overwrite those it is given."""
    torch.manual_seed(0)
    return case.inputs()


def release() -> None:
    """Give memory back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _row(
    case: Case, by: str, call: Call, sets: list[Inputs], right: list[Tensor] | None, floor: float | None
) -> tuple[Row, Callable[[], Any]]:
    """Return a row without its time, and what makes one call of every set when run."""
    fresh = _fresh(case)
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = call(fresh)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    error = None if right is None else error_of(tensors(found), right)
    del fresh, found
    release()
    torch.cuda.reset_peak_memory_stats()
    before = 0 if case.resident else torch.cuda.memory_allocated()
    call(sets[0])
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    run, graph = _graphed([partial(call, given) for given in sets])
    return Row(case.op, case.name, case.shape, by, None, floor, error, peak, first, graph), run


def _graphed(calls: list[Callable[[], Any]]) -> tuple[Callable[[], Any], bool]:
    """Return what makes the calls, one after the other, and whether it replays a graph of them."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for call in calls:  # a peer may prepare something for each set
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception:  # the call waits for the device, or its library forbids capture
        torch.cuda.synchronize()
        # A capture that fails leaves its stream current and the device's generator in wait for its end.
        torch.cuda.set_stream(current)
        drawn_from = torch.cuda.default_generators[torch.cuda.current_device()]
        drawn_from.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        release()
        return lambda: [call() for call in calls], False
    return graph.replay, True


def _in_turns(runs: list[Callable[[], Any]]) -> list[float]:
    """Return the median milliseconds of each run."""
    for run in runs:
        run()
    once = sum(_elapsed(run) for run in runs)
    rounds = max(3, min(MAX_REPLAYS, int(len(runs) * LONG_ENOUGH_MS / max(once, 1e-3))))
    rows = [[_elapsed(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*rows, strict=True)]


def _elapsed(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))


def error_of(found: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest ratio of the RMS of an output's error to that of the output."""
    ratios = []
    for a, b in zip(found, right, strict=True):
        exact = b.double()
        ratios.append(float((a.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30)))
    return max(ratios)
