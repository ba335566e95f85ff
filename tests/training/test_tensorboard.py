"""TensorBoard's files where they cannot be written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bimamba_lit.errors import UserError
from bimamba_lit.training.tensorboard import TensorBoard


def lost(folder: Path) -> TensorBoard:
    """Return the log of a folder that is lost, after its writer has met the loss at its own time."""
    log = TensorBoard(folder, name="", version="")
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    writer = log.experiment._get_file_writer().event_writer._async_writer
    shutil.rmtree(folder)
    log.log_metrics({"loss": 1.0}, 1)
    writer._worker.join(10)
    return log


@pytest.mark.parametrize("call", [lambda log: log.log_metrics({"loss": 1.0}, 2), lambda log: log.save()])
def test_a_folder_that_is_lost_ends_nothing_whichever_call_meets_it(
    call: Callable[[Any], None], tmp_path: Path, capfd: Any
) -> None:
    log = lost(tmp_path)
    for _ in range(2):
        call(log)
    assert capfd.readouterr().err == f"bimamba: cannot write {log.log_dir}: No such file or directory; going on\n"
    log.finalize("success")


def test_the_figures_after_a_loss_are_in_another_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = lost(tmp_path / "log")
    log.save()  # tells
    for step in (2, 3):
        log.log_metrics({"loss": 1.0}, step)
    log.finalize("success")
    assert [event.step for event in EventAccumulator(str(tmp_path / "log")).Reload().Scalars("loss")] == [2, 3]


def test_a_file_that_cannot_be_begun_is_told(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*tensorboard.*: File exists"):
        TensorBoard(tmp_path, name="tensorboard", version="").experiment  # noqa: B018
