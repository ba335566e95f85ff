"""TensorBoard's files, that survive a resume and a full disk; the record of a run is ``metrics.csv``."""

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bimamba_lit.errors import UserError, causes


class TensorBoard(TensorBoardLogger):
    """TensorBoardLogger, but a file that cannot be written ends neither training nor, with space, the next file."""

    _failed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer.

        Raises:
            UserError: If its file cannot be begun.
        """
        threading.excepthook = _quiet
        try:
            return super().experiment
        except OSError as error:
            raise UserError(f"cannot write {self.log_dir}: {error.strerror or error}") from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures, or say once that they cannot be written."""
        self._try(lambda: super(TensorBoard, self).log_metrics(metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Write out what is logged."""
        self._try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write out what is logged and close the file."""
        self._try(lambda: super(TensorBoard, self).finalize(status))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError) as raised:  # Lightning takes any error for a figure of the wrong type
            error = next((cause for cause in causes(raised) if isinstance(cause, OSError)), None)
            if error is None:
                raise
            self._experiment = None  # the writer is of no more use; the next figures open another file
            if not self._failed:
                print(f"bimamba: cannot write {self.log_dir}: {error.strerror or error}; going on", file=sys.stderr)
            self._failed = True


def purge(logger: TensorBoardLogger, step: int) -> None:
    """Have TensorBoard leave out what earlier parts of a run logged for ``step`` and after."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from torch.utils.tensorboard import SummaryWriter

    if isinstance(logger.experiment, SummaryWriter):
        start = Event(session_log=SessionLog(status=SessionLog.START))
        logger.experiment._get_file_writer().add_event(start, step)


def _quiet(args: Any) -> None:
    """Print what ended a thread, unless it is TensorBoard's, whose error comes back with the next figures."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(args)
