"""Starts the program many times while importing it once: a process that forks one for every command it is told.

A line of JSON on standard input is a command to start or a process to wait for, answered by a line on standard output.
What is started is a real process, in a process group of its own, with files for its output: it can be killed.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bimamba_lit.cli import main
from bimamba_lit.training import checkpoint_file, command_line, distill  # noqa: F401


def serve() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        if "wait" in told:
            print(wait(told["wait"], told["seconds"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run(**told)
        print(pid, flush=True)


def wait(pid: int, seconds: float) -> int:
    """Return the exit code of a process, a signal's number below zero, or kill what has no end."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def run(args: list[str], output: str, path: list[str], env: dict[str, str], fault: dict[str, Any] | None) -> None:
    os.setpgid(0, 0)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = path
    os.environ.update(env)
    if fault is not None:
        break_writes(**fault)
    if "PAUSE" in env:
        distill.load_teacher = pause
    main(args)
    sys.exit(0)


def pause(*_: Any) -> None:
    """Load a teacher that takes long."""
    print("pausing", flush=True)
    time.sleep(60)


def break_writes(first: int, call: int, number: int | None = None, last: int | None = None) -> None:
    """From the checkpoint ``first`` on (up to ``last``), end this process at a call of write, or have the disk full."""
    save, count = checkpoint_file._save, 0

    def broken(checkpoint: dict[str, Any], file: Any) -> None:
        nonlocal count
        count += 1
        if first <= count <= (last or first):
            save(checkpoint, Broken(file, call, number))
            if number is not None:
                os.kill(os.getpid(), number)
        else:
            save(checkpoint, file)

    checkpoint_file._save = broken


class Broken:
    def __init__(self, file: Any, call: int, number: int | None) -> None:
        self.file, self.calls, self.number = file, call, number
        self.flush: Callable[[], None] = file.flush

    def write(self, data: Any) -> int:
        self.calls -= 1
        if self.calls == 0 and self.number is not None:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), self.number)
        elif self.calls <= 0 and self.number is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
