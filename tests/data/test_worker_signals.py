import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, subprocess, sys, time
from multiprocessing import get_context
from bimamba_lit.data.worker_signals import hold_signals_back

fork = get_context("fork")
ready = fork.Event()

def work():
    hold_signals_back(0)
    ready.set()
    time.sleep(60)

worker = fork.Process(target=work)
worker.start()
ready.wait(30)
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.{name})"], check=True)
worker.join(0.3)
print(worker.is_alive())
worker.terminate()
worker.join(30)
print(worker.exitcode)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_a_worker_outlives_the_signals_of_others_and_ends_by_its_parents() -> None:
    """Who stops a run tells all of its processes, and the last batch is still to come from its workers."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.split() == ["True", "0"], (done.stdout, done.stderr)
