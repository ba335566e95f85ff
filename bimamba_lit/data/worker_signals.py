"""Data workers outlive the signals that ask a run to stop, which still needs their batches to stop well.

A terminal and Slurm tell all processes of a run. Workers are forked with the signals held back, so that none takes them
before it is ready, and keep them so. SIGTERM is also how a worker's parent ends it: a thread of the worker takes it and
looks who sent it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

# Windows has neither of the last two; macOS cannot tell who sent a signal.
_TELLS_SENDER = hasattr(signal, "sigwaitinfo")
_NAMES = ("SIGINT", "SIGUSR1", "SIGTERM") if _TELLS_SENDER else ("SIGINT", "SIGUSR1")
_HELD = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class ShieldedLoader(DataLoader):
    """A loader that forks its workers with the signals held back; they need :func:`hold_signals_back`, too."""

    def _get_iterator(self) -> Any:
        with _held_back():
            return super()._get_iterator()


class StatefulShieldedLoader(StatefulDataLoader):
    """The same with a state."""

    def _get_iterator(self) -> Any:
        with _held_back():
            return super()._get_iterator()


def hold_signals_back(worker: int) -> None:
    """Take no signal in a worker but SIGTERM from its parent; a loader's ``worker_init_fn``."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    if _TELLS_SENDER:
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


@contextmanager
def _held_back() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            os._exit(0)
