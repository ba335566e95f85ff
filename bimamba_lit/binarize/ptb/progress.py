"""Telling how far a calibration is: a bar in a terminal, a line for each block elsewhere."""

from time import perf_counter
from typing import Any

_EVERY_SECONDS = 10.0


class CalibrationProgress:
    """Shows the block at work, the share that is done and the time left, while the context lasts.

    Args:
        steps: Steps of the whole calibration.
        shown: Whether to show anything.
    """

    def __init__(self, steps: int, shown: bool) -> None:
        self._steps, self._shown = steps, shown
        self._done, self._block = 0, ""
        self._started = self._told = perf_counter()
        self._bar: Any = None

    def __enter__(self) -> "CalibrationProgress":
        if self._shown:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
            bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn())
            if bar.console.is_terminal:
                bar.start()
                self._bar, self._task = bar, bar.add_task("calibrating", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def block(self, name: str) -> None:
        """Say which block is next."""
        self._block = name
        if self._bar is not None:
            self._bar.update(self._task, description=f"calibrating {name}")

    def step(self) -> None:
        """Count a step."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._shown and perf_counter() - self._told >= _EVERY_SECONDS:
            self._told = perf_counter()
            minutes, seconds = divmod((self._told - self._started) * (self._steps / self._done - 1), 60)
            share = self._done / self._steps
            print(f"calibrating {self._block}: {share:.0%}, {minutes:.0f} min {seconds:.0f} s left", flush=True)
