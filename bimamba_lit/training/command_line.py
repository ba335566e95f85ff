"""``fit``, ``validate`` and ``test``: LightningCLI with this project's run folders and none of its surprises.

What differs from LightningCLI, and why:

* Settings are checked first, so that a wrong key is answered by its name (:mod:`recipe_check`).
* A checkpoint's hyperparameters never override the command line: ``_parse_ckpt_path`` does nothing.
* An option is never taken for another that it abbreviates (``--trainer.max_step`` for ``max_steps``).
* Checkpoints are read with ``weights_only=True``, always.
* ``${…}`` in a recipe is resolved when the file is read (:mod:`recipe_read`).
* Folders of loggers and checkpoints follow ``trainer.default_root_dir``: they are set here, since neither links nor
  interpolation reach into lists or follow the command line.
* ``config.yaml`` is written when the run really begins, so that a run refused for bad input leaves nothing behind.
"""

import logging
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import DistError

import bimamba_lit.data  # noqa: F401  (so that its classes can be named in short: --data=TextDataModule)
from bimamba_lit.callbacks import NonFiniteGuard, ProgressLines, RandomState, StepsBar, Throughput
from bimamba_lit.errors import UserError, causes
from bimamba_lit.interruption import Interrupted, interruption
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.training.csv_logger import CSVLogger
from bimamba_lit.training.folder_lock import locked
from bimamba_lit.training.language import LanguageModule
from bimamba_lit.training.last_checkpoint import LastCheckpoint
from bimamba_lit.training.model_line import ModelLine
from bimamba_lit.training.recipe_check import check_settings
from bimamba_lit.training.recipe_read import read_settings, with_resolved_recipes
from bimamba_lit.training.record import SaveConfig, find_tests, measure_tests, write_run_summary
from bimamba_lit.training.refusals import refuse_other_spread, refuse_twice, refuse_unreadable
from bimamba_lit.training.resumed_logs import ResumedLogs
from bimamba_lit.training.run_folder import CONFIG, LAST_CHECKPOINT, RunFolder, choose_run_folder
from bimamba_lit.training.tensorboard import TensorBoard

COMMANDS = {
    "fit": "Train a teacher or distill a student, as a recipe says.",
    "validate": "Measure a model on a recipe's validation text and write its summary.",
    "test": "Measure a model on a recipe's test text.",
}
GROUPS: dict[str, Any] = {
    "trainer": pl.Trainer,
    "checkpoint": LastCheckpoint,
    "model": type[pl.LightningModule],
    "data": type[pl.LightningDataModule],
    "tests": list[str],
    "seed_everything": bool | int,
    "ckpt_path": str | None,
}
# What taking up a checkpoint fails with; being out of memory, which is a RuntimeError too, has a class of its own.
_DAMAGED = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError)
_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Read a value; jsonargparse 4.53 hands null on as the word None where a class is an argument of another."""
    return None if text.strip() == "None" else _load_yaml(text)


set_loader("yaml", _load, (yaml.YAMLError,))
_HELP = ("-h", "--help", "--print_config")


def run(command: str, args: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        command: Which.
        args: The arguments after it.

    Raises:
        UserError: If a setting, a file or the run folder is not right.
    """
    build(command, command, args, CommandLine)


def build(command: str, method: str, args: Sequence[str], kind: type["CommandLine"]) -> "CommandLine":
    """Return a command line that has built what a recipe says, and run it if it runs something.

    Args:
        command: What it is called.
        method: The method of ``Trainer`` whose arguments it takes.
        args: The arguments after the command.
        kind: What it does with them.

    Raises:
        UserError: If a setting, a file or the run folder is not right.
    """
    if not any(arg.split("=")[0] in _HELP or arg.split("=")[0].endswith(".help") for arg in args):
        settings = read_settings(args)
        if not args:
            raise UserError(f"{command} needs a recipe: bimamba {command} -c recipes/NAME.yaml")
        check_settings(settings, GROUPS)
        if "model" not in settings:
            raise UserError(f"{command} is given no model: take a recipe that names one under its key model")
        seed = settings.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise UserError(f"seed_everything: {seed} is out of range, it must be 0 to {(1 << 32) - 1}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_wanted_line)
    # Lightning 2.6 calls what torch 2.13 and jsonargparse 4.53 deprecate: nothing that a user could mend.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
    warnings.filterwarnings(
        "ignore", r"\s*(By default only one Jsonargparse|``instantiate_classes``)", DeprecationWarning
    )
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*IterableDataset. has .__len__. defined.*")  # whose workers share its shards
    warnings.filterwarnings(
        "ignore", ".*It is recommended to use `self.log.*sync_dist=True.*"
    )  # summed by torchmetrics
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", "`torch._prims_common.check` is deprecated", FutureWarning)  # by torch
    warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")  # PTB
    warnings.filterwarnings("ignore", "The dirpath has changed from.*")  # one run's checkpoint, another run's folder
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # the run folder is ours: see run_folder
    return _one_command(method, kind)([method, *with_resolved_recipes(args)])


def _first_line(error: BaseException) -> str:
    """Return the first line of another library's error, with its kind if it is none that speaks to users."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, MisconfigurationException) else f"{type(error).__name__}: {line}"


def _wanted_line(record: logging.LogRecord) -> bool:
    """Drop Lightning's advertisement of another package; keep the rest."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def _one_command(command: str, kind: type["CommandLine"]) -> type["CommandLine"]:
    """Return a command line that builds the parser of one command only: each takes part of a second."""
    skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only", "verbose"}
    return type("CommandLine", (kind,), {"command": command, "subcommands": staticmethod(lambda: {command: skipped})})


class CommandLine(LightningCLI):
    """LightningCLI as the module's docstring tells."""

    command: str
    run_folder: RunFolder

    def __init__(self, args: Sequence[str]) -> None:
        # Else Lightning warns that the arguments are given twice; the processes of other devices are started with them.
        self._argv, sys.argv = sys.argv, sys.argv[:1]
        options = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={args[0]: options, "exit_on_error": False, "prog": "bimamba"},
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the checkpoint and the texts measured at the end top-level keys."""
        parser.usage = f"bimamba {self.command} -c RECIPE.yaml [--key value ...]"
        parser.description = COMMANDS[self.command]
        parser.epilog = "What a class takes: --model.help=Distill, --data.help=TextDataModule."
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_argument(
            "--tests", type=list[str], default=[], help="texts to measure on once the run is at its end"
        )
        parser.set_defaults(
            {
                "checkpoint.filename": LAST_CHECKPOINT.stem,
                "checkpoint.enable_version_counter": False,
                "trainer.enable_model_summary": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: what the command line says counts, not what a checkpoint remembers."""

    def instantiate_classes(self) -> None:
        """Make what the recipe names.

        Raises:
            UserError: If a setting of a class of Lightning's is out of range.
        """
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise UserError(_first_line(error)) from error

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and point everything that writes to it."""
        sys.argv = self._argv
        config = self.config[self.command]
        find_tests(config.tests)
        base = Path(config.trainer.default_root_dir or Path("runs") / "unnamed")
        parser = self._subcommand_parsers[self.command]
        self.recipe = yaml.safe_load(parser.dump(config, skip_unset=False))
        self.run_folder = choose_run_folder(base, self.recipe, self.command, config.ckpt_path)
        if self.run_folder.checkpoint is not None:
            self._checkpoint_state = _state_of(self.run_folder.checkpoint)
            refuse_unreadable(self.run_folder.checkpoint, config.trainer.strategy)
        config.trainer.default_root_dir = str(self.run_folder.path)
        config.ckpt_path = None if self.run_folder.checkpoint is None else str(self.run_folder.checkpoint)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.run_folder.path / LAST_CHECKPOINT.parent)
        for key in ("trainer", "checkpoint"):
            self.recipe[key] = yaml.safe_load(parser.dump(config, skip_unset=False))[key]
        self.recipe["checkpoint"]["dirpath"] = None
        self.recipe.pop("ckpt_path", None)
        if self.run_folder.notice:
            print(self.run_folder.notice)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with the callbacks and loggers that every run has."""
        config = self._get(self.config_init, "trainer")
        if not config.fast_dev_run:
            kwargs["logger"] = self._loggers(config.logger)
        own = config.callbacks or []
        own = own if isinstance(own, list) else [own]
        every = config.log_every_n_steps or 50
        standing: list[pl.Callback] = [SaveConfig(self.recipe), ModelLine(), NonFiniteGuard(), Throughput(every)]
        standing.append(ResumedLogs())
        refuse_twice(own)
        has_bar = any(isinstance(callback, ProgressBar) for callback in own)
        if config.enable_progress_bar is not False and not has_bar:
            terminal = sys.stdout.isatty()
            kwargs["enable_progress_bar"] = terminal
            standing.append(StepsBar() if terminal else ProgressLines(every))
        standing = [one for one in standing if not any(isinstance(callback, type(one)) for callback in own)]
        # The random state comes first: it is to be restored before a callback of the recipe draws from it.
        restored = [] if any(isinstance(callback, RandomState) for callback in own) else [RandomState()]
        trainer = self.make_trainer(callbacks=[*restored, *own, *standing], **kwargs)
        # Lightning's own handlers stop between any two batches, and Slurm's save in the midst of one.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def make_trainer(self, **settings: Any) -> pl.Trainer:
        """Build a trainer.

        Args:
            settings: What takes the place of the recipe's.

        Raises:
            UserError: If its settings do not fit each other or the machine.
        """
        try:
            trainer: pl.Trainer = super().instantiate_trainer(**settings)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            reason = _first_line(error)
            if "gpu backend" in reason:
                raise UserError("trainer.accelerator: torch finds no GPU here: set it to cpu or auto") from error
            raise UserError(f"trainer: {reason}") from error
        refuse_other_spread(trainer)
        return trainer

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """Return the loggers: ``metrics.csv`` always, beside it those of the recipe or else TensorBoard."""
        if configured is False:
            return False
        named = configured if isinstance(configured, list) else [configured]
        named = [logger for logger in named if isinstance(logger, Logger)]
        if self.command != "fit":
            return named or False
        folder = self.run_folder.path
        return [CSVLogger(folder), *(named or [TensorBoard(folder, name="tensorboard", version="")])]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; no two processes train in one folder."""
        folder = self.run_folder.path
        was_there = folder.exists()
        trains = subcommand == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        with locked(folder, self.recipe) if trains else nullcontext():
            self._run_in(folder, was_there, subcommand)

    def _run_in(self, folder: Path, was_there: bool, subcommand: str) -> None:
        """Run the command; take back the folder that was made for a run that never began."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            never_began = self._not_taken_up() or not (folder / CONFIG).exists()
            if not was_there and never_began and self.trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
            death = next(filter(is_worker_death, causes(error)), None)
            if interruption.stopped(error) or (death and interruption.asked is not None):
                self._tell_what_is_saved()
            if death:
                told = str(death).rstrip(". ") or type(death).__name__
                raise UserError(
                    f"a data worker ended ({told}), for want of memory or killed: what {LAST_CHECKPOINT} of {folder} "
                    "holds is safe, go on from there with --ckpt_path last, or with fewer data.workers"
                ) from error
            if lost := next(filter(_is_process_lost, causes(error)), None):
                told = str(lost).partition("] ")[2].partition(". ")[0] or _first_line(lost)
                raise UserError(
                    f"another process of the run ended or cannot be reached ({told}): look at what it said; "
                    f"what {LAST_CHECKPOINT} of {folder} holds is safe, go on from there with --ckpt_path last"
                ) from error
            self._refuse_not_taken_up(error)
            raise

    def _not_taken_up(self) -> bool:
        """Say whether the run was to go on from a checkpoint and has not trained on a batch since."""
        return self.run_folder.checkpoint is not None and not getattr(self.model, "has_begun", True)

    def _refuse_not_taken_up(self, error: BaseException) -> None:
        """Raise a sentence on the checkpoint if the error arose before the first batch after it."""
        resumed = self.run_folder.checkpoint is not None
        too_large = resumed and isinstance(error, OverflowError)  # an optimizer's setting is first used in its step
        if too_large or (isinstance(error, _DAMAGED) and not isinstance(error, UserError) and self._not_taken_up()):
            raise UserError(
                f"{self.run_folder.checkpoint} cannot be taken up by this run: it is damaged, or of another recipe or "
                f"version ({_first_line(error)})"
            ) from error

    def _tell_what_is_saved(self) -> None:
        """Stop with the step that is saved; quietly on all ranks but the first."""
        last = next((one for one in self.trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)), None)
        together = last is not None and last.stops
        if not self.trainer.is_global_zero:
            if not isinstance(getattr(self.trainer.strategy, "cluster_environment", None), LightningEnvironment):
                interruption.end()
            if not together:
                interruption.pass_on()  # the first of the processes that Lightning started may not have been told
            interruption.end(0)  # else Lightning kills it
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not together:
            launcher.kill(signal.SIGKILL)  # likewise the others
        raise Interrupted(last.saved_step if last else None)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Have checkpoints read as data only, and no table printed: the closing line has the figures."""
        more = {"weights_only": True} | ({} if subcommand == "fit" else {"verbose": False})
        return super()._prepare_subcommand_kwargs(subcommand) | more

    def after_fit(self) -> None:
        """Measure the trained model, unless the last step was a validation, and write the summary."""
        if not isinstance(self.model, LanguageModule) or self.trainer.fast_dev_run or self.trainer.interrupted:  # type: ignore[attr-defined]
            return
        steps = self.trainer.global_step
        if self.model.evaluated.get("step") != steps:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            for logger in self.trainer.loggers:
                if isinstance(logger, CSVLogger):  # which is silent outside of fit
                    figures = {f"val/{name}": value for name, value in self.model.evaluated.items() if name != "step"}
                    logger.experiment.write(steps - 1, figures)
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger) and self.trainer.is_global_zero:
                logger.experiment.sync()
        self._close(f" after {steps} step{'s' * (steps != 1)}")

    def after_validate(self) -> None:
        """Write the summary, unless it would speak of another checkpoint than the one that the run ended with.

        Nothing keeps one from measuring in a folder where another process trains: the checkpoint may be replaced then.
        """
        if not isinstance(self.model, LanguageModule) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, used = self.run_folder.path, self.run_folder.checkpoint
        last = folder / LAST_CHECKPOINT
        replaced = used is not None and _state_of(used) != self._checkpoint_state
        replaced = self.trainer.strategy.broadcast(replaced)  # all processes measure the tests, or none does
        if not replaced and (used is None or not last.exists() or last.samefile(used)):
            self._close("")
        elif self.trainer.is_global_zero:
            figure = self.model.evaluated["bits_per_byte"]
            print(f"{used}: {figure:.3f} bits per byte; {folder / SUMMARY} is left as it is")

    def after_test(self) -> None:
        """Print the figures of the test text; the summary is of the validation text."""
        if isinstance(self.model, LanguageModule) and self.trainer.is_global_zero:
            figures = self.model.evaluated
            print(f"test: {figures['bits_per_byte']:.3f} bits per byte, perplexity {figures['perplexity']:.4g}")

    def _close(self, when: str) -> None:
        folder = self.run_folder.path
        tests = measure_tests(self.trainer, self.model, self.datamodule, self.recipe["tests"])
        write_run_summary(self.trainer, self.model, self.datamodule, folder, self.recipe, tests)
        if self.trainer.is_global_zero:
            print(f"{folder}: {self.model.evaluated['bits_per_byte']:.3f} bits per byte{when}; see {folder / SUMMARY}")


def _state_of(checkpoint: Path) -> tuple[int, int] | None:
    """Return what is another once a checkpoint is replaced, or None where it is no more."""
    if not checkpoint.exists():
        return None
    found = checkpoint.stat()
    return found.st_ino, found.st_mtime_ns


def is_worker_death(error: BaseException) -> bool:
    """Say whether a process that loads data ended, by a signal for instance; what it raised is another matter.

    torch raises this from a signal handler, wherever the run is, and so in code too that wraps any error in its own. Of
    a process that has just ended it raises what came of asking it for the memory of a batch.
    """
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        frames = traceback.walk_tb(error.__traceback__)
        return any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame, _ in frames)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _is_process_lost(error: BaseException) -> bool:
    """Say whether this process lost another one of its run, or never found it."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
