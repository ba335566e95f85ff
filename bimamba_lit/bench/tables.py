"""``bimamba bench``: the tables."""

import datetime
import platform
from importlib.metadata import version
from importlib.util import find_spec

import torch

from bimamba_lit.bench.models import model_accuracy
from bimamba_lit.bench.ops_accuracy import ops_accuracy
from bimamba_lit.bench.speed import SHAPE, speed


def bench(what: str, threads: int) -> None:
    """Print the tables as Markdown, headed by the machine, the versions and the date.

    Args:
        what: ``accuracy``, ``cpu`` or ``all``.
        threads: Threads of torch. Measure alone: two torch processes on the same cores slow each other manifold.
    """
    torch.set_num_threads(threads)
    peers = f", transformers {version('transformers')}" if find_spec("transformers") else ""
    print(f"{datetime.date.today()}, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{threads} threads, torch {torch.__version__}{peers}\n")
    if what in ("accuracy", "all"):
        print("| fp32 form | relative error |\n|---|---|")
        for name, error in [*ops_accuracy(), *model_accuracy()]:
            print(f"| {name} | {error:.1e} |")
        print()
    if what in ("cpu", "all"):
        print(f"{SHAPE}\n\n| what | ms |\n|---|---|")
        for name, milliseconds in speed():
            print(f"| {name} | {milliseconds:.1f} |", flush=True)
