"""Signals that ask a run to stop so that it can go on later: SIGTERM, SIGINT and SIGUSR1, which Slurm can send ahead.

The first one stops what runs as soon as nothing is lost by it: at once while there is nothing to save, and else where
training looks for it, after the optimizer's step. Another one, a second later or more, ends the process on the spot;
what comes sooner counts as the same, since `timeout`, Slurm and a parent process tell a process twice. What comes once
the run has stopped changes nothing any more: the processes of a run are not told, and do not end, at the same moment.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import NoReturn

from bimamba_lit.errors import causes

RESUMABLE = 75
"""The exit code of a run that was interrupted and can be resumed: EX_TEMPFAIL of sysexits.h."""

_SAME = 1.0  # seconds in which another signal is the same request
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is unknown to Windows


class Interrupted(BaseException):
    """What stops a run that was asked to stop; no error, and nothing that ``except Exception`` would take.

    Args:
        step: The optimizer step of the checkpoint that is left behind; None where there is none of this run.
    """

    def __init__(self, step: int | None = None) -> None:
        super().__init__(step)
        self.step = step


class Interruption:
    """Takes the signals.

    Attributes:
        asked: The signal that asked this process to stop; None while none has.
        waits: Whether the one who runs looks at ``asked`` by itself; else :class:`Interrupted` is raised at once.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.asked: signal.Signals | None = None
        self.waits = False
        self._raised = False
        self._over = False
        self._since = 0.0
        self._process, self._parent = os.getpid(), os.getppid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals as long as the block lasts. Only a main thread can; in another, nothing happens."""
        self._reset()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._over else handler)
            self._reset()
            _end_children()

    def stopped(self, error: BaseException) -> Interrupted | None:
        """Return what stopped a run, where ``error`` is it or what failed on its way out; else None."""
        for cause in causes(error):
            if isinstance(cause, SystemExit):
                return None
            if isinstance(cause, Interrupted):
                return cause
        return Interrupted() if self._raised else None

    def pass_on(self) -> None:
        """Tell the process that started this one."""
        if self.asked is not None and os.getppid() == self._parent:  # else it is there no more
            os.kill(self._parent, self.asked)

    def end(self, code: int = RESUMABLE) -> NoReturn:
        """Exit from a run that has stopped, whatever signals there are still to come."""
        self._over = True
        sys.exit(code)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork, which is not the run
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.asked is None:
            self.asked, self._since = signal.Signals(number), monotonic()
            if not self.waits:
                self._raised = True
                raise Interrupted
            _say(f"bimamba: {self.asked.name}: stopping after this step; once more stops at once\n")
        elif monotonic() - self._since >= _SAME:
            _end_children()
            _say("bimamba: stopped at once; the last checkpoint is whole\n")
            os._exit(RESUMABLE)


def _end_children() -> None:
    """End data workers: one that was just being started may not listen to a milder signal."""
    children = multiprocessing.active_children()
    if not children or not hasattr(signal, "SIGCHLD"):
        return
    told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the end of a worker for a failure
    for process in children:
        process.kill()
    for process in children:
        process.join()
    signal.signal(signal.SIGCHLD, told)


def _say(line: str) -> None:
    os.write(2, line.encode())  # a print that the signal came in the middle of could not be entered again


interruption = Interruption()
