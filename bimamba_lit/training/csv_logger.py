"""``metrics.csv`` in the run folder, that survives a resume, a kill and a full disk.

Lightning's logger deletes the file of an earlier run as soon as it is asked for its writer, and a resumed run would
lose its past. Here :class:`ResumedLogs` cuts the file back to the step that training resumes at.

What is logged for one step is one row, rewritten in place while the step lasts. Rows are appended, as writing the whole
file anew for every one would cost the square of its length; a row cut off by a kill is dropped on resume. The file is
written anew, under a temporary name, where it is cut, gains a column or has a row that grows shorter, whose end would
outlive a kill. Rows that cannot be written are kept, and tried again with the next.
"""

import csv
import errno
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing


class CSVLogger(LightningCSVLogger):
    """Writes ``metrics.csv`` straight into ``save_dir``, one row a step, and continues it when a run resumes.

    Rows are numbered as Lightning numbers them: the first optimizer step is row 0. A run resumed at step N keeps the
    rows 0 to N-1; a fresh run starts the file anew. Outside of ``fit`` nothing is written. Hyperparameters are not
    either: the run folder has ``config.yaml``.

    Args:
        save_dir: The run folder.

    Raises:
        UserError: If the file cannot be written, or an existing one is not one of these.
    """

    def __init__(self, save_dir: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(save_dir), name="", version="")
        self._metrics_file = MetricsFile(Path(save_dir) / "metrics.csv")
        self._silent = False

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return os.fspath(self.save_dir)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return os.fspath(self.save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The file."""
        return self._metrics_file

    @rank_zero_only
    def log_graph(self, model: nn.Module, *_: Any) -> None:
        """Learn from the module's trainer whether this is a fit: it is the one call that hands over the module."""
        trainer: Any = model.trainer
        self._silent = trainer.state.fn != TrainerFn.FITTING

    @rank_zero_only
    def log_hyperparams(self, *_: Any) -> None:
        """Write nothing."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Add figures to the row of ``step``, which is the one after the last where it is not given."""
        if not self._silent:
            self._metrics_file.write(step, metrics)

    @rank_zero_only
    def save(self) -> None:
        """Do nothing: every row is in the file as soon as it is logged."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing, as in :meth:`save`."""


class MetricsFile:
    """A CSV file of one row a step whose columns may grow.

    Args:
        path: Where it lies; its folder is created.

    Attributes:
        step: The number of the newest row; -1 where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = -1
        self._begun = False
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0
        self._unwritten: list[dict[str, Any]] = []  # newest last; the present row is among them

    def begin(self, step: float) -> None:
        """Keep the rows before ``step`` (none for 0), drop the others, and go on after them.

        Raises:
            UserError: If the file cannot be written, or is not one of these.
        """
        columns, rows = self._read() if step > 0 else ([], [])
        rows = [row for row in rows if int(row["step"]) < step]
        self._begun, self._columns = True, columns if rows else []
        self._row, self.step = (dict(rows[-1]), int(rows[-1]["step"])) if rows else ({}, -1)
        if rows:
            self._rewrite(rows)
        else:
            self.path.unlink(missing_ok=True)

    def row(self, step: int) -> dict[str, Any]:
        """Return the figures of the newest row, if it is that of ``step``, as numbers by column."""
        figures = self._row if step == self.step else {}
        return {name: _number(value) for name, value in figures.items() if name != "step" and value != ""}

    def write(self, step: int | None, metrics: Mapping[str, Tensor | float]) -> None:
        """Add figures to the row of ``step``: the last one where it has that number, else a new one.

        Args:
            step: The number of the row; None for the one after the last.
            metrics: Figures by column.
        """
        if not self._begun:
            self.begin(float("inf"))
        step = self.step + 1 if step is None else step
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        same_row = bool(self._row) and step == self.step
        self._row, self.step = {**(self._row if same_row else {}), "step": step, **values}, step
        if self._unwritten:
            self._unwritten[-1 if same_row else len(self._unwritten) :] = [self._row]
        try:
            self._put(same_row)
        except UserError as error:
            if not self._unwritten:
                print(f"bimamba: {error}; its rows are kept and tried again", file=sys.stderr)
                self._unwritten = [self._row]

    def sync(self) -> None:
        """Have every row outlast a power cut.

        Raises:
            UserError: If there are rows that cannot be written.
        """
        if self._unwritten:
            self._put(True)
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _put(self, same_row: bool) -> None:
        added = [name for name in ("step", *self._row) if name not in self._columns]
        if not (added or self._unwritten) and self._put_row(same_row):
            return
        rows: list[dict[str, Any]] = [*self._read()[1]]
        new = self._unwritten or [self._row]
        self._columns += dict.fromkeys(name for row in new for name in ("step", *row) if name not in self._columns)
        self._rewrite([*(row for row in rows if int(row["step"]) != int(new[0]["step"])), *new])
        self._unwritten = []

    def _put_row(self, in_place: bool) -> bool:
        """Write the row in its place, unless it has grown shorter; return whether it is written."""
        line = self._line(self._row)
        try:
            with self.path.open("rb+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if in_place and self._row_start + len(line) < end:
                    return False
                self._row_start = file.seek(self._row_start if in_place else end)
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return True
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        header = self._line({name: name for name in self._columns})
        lines = [header, *(self._line(row) for row in rows)]
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(lines))
        self._row_start = sum(len(line) for line in lines[:-1])

    def _line(self, row: Mapping[str, Any]) -> bytes:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(row.get(name, "") for name in self._columns)
        return out.getvalue().encode()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from error
        # What follows the last line feed is a row that a kill cut off.
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = list(reader)
        if not all((row.get("step") or "").isdecimal() for row in rows):
            raise UserError(f"{self.path} has rows without a step number, so it is no metrics file; move it away")
        return list(reader.fieldnames or []), rows


def _number(value: Any) -> float:
    """Return a figure as it was logged, where it was read from the file too."""
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else float(value)
