"""``bimamba bench``: the tables."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from bimamba_lit.bench.models import model_accuracy
from bimamba_lit.bench.ops_accuracy import ops_accuracy
from bimamba_lit.bench.speed import SHAPE, Row, speed
from bimamba_lit.bench.tokenizing import tokenizing

PEERS = ("transformers", "mambapy", "datasets")


def bench(what: str, threads: int, text: str | None = None) -> None:
    """Print the tables as Markdown, headed by the machine, the versions and the date.

    Args:
        what: ``accuracy``, ``cpu``, ``data`` or ``all``.
        threads: Threads of torch. Measure alone: two torch processes on the same cores slow each other manifold.
        text: The text file that ``data`` tokenizes; none given, the offline corpus many times.

    Raises:
        UserError: If the text cannot be read.
    """
    torch.set_num_threads(threads)
    peers = "".join(f", {name} {found}" for name in PEERS if (found := _version(name)))
    print(f"{datetime.date.today()}, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{threads} threads, torch {torch.__version__}{peers}\n")
    if what in ("accuracy", "all"):
        print("| fp32 form | relative error |\n|---|---:|")
        for name, error in [*ops_accuracy(), *model_accuracy()]:
            print(f"| {name} | {error:.1e} |")
        print()
    if what in ("cpu", "all"):
        print(f"{SHAPE}; median ms\n\n| what | bimamba-lit | binary (FBI) | transformers | times as fast |")
        print("|---|---:|---:|---:|---:|")
        for row in speed():
            print(_speed_line(row), flush=True)
        print()
    if what in ("data", "all"):
        print("| tokenizing and packing | seconds | peak memory, MB |\n|---|---:|---:|")
        for name, seconds, megabytes in tokenizing(text):
            print(f"| {name} | {seconds:.1f} | {megabytes:.0f} |", flush=True)


def _speed_line(row: Row) -> str:
    peer = ("not installed", "") if row.peer is None else (f"{row.peer:.1f}", f"{row.peer / row.dense:.1f}")
    return f"| {row.name} | {row.dense:.1f} | {row.binary:.1f} | {peer[0]} | {peer[1]} |"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
