"""``fit``, ``validate`` and ``test``: LightningCLI with this project's run folders and none of its surprises.

What differs from LightningCLI, and why:

* Settings are checked first, so that a wrong key is answered by its name (:mod:`recipe_check`).
* A checkpoint's hyperparameters never override the command line: ``_parse_ckpt_path`` does nothing.
* An option is never taken for another that it abbreviates (``--trainer.max_step`` for ``max_steps``).
* Folders of loggers and checkpoints follow ``trainer.default_root_dir``: they are set here, since neither links nor
  interpolation reach into lists or follow the command line.
* ``config.yaml`` is written when the run really begins, so that a run refused for bad input leaves nothing behind.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

import bimamba_lit.data  # noqa: F401  (so that its classes can be named in short: --data=TextDataModule)
from bimamba_lit.callbacks import NonFiniteGuard, ProgressLines, RandomState, Throughput
from bimamba_lit.errors import UserError
from bimamba_lit.training.csv_logger import CSVLogger
from bimamba_lit.training.language import LanguageModule
from bimamba_lit.training.recipe_check import check_settings, read_settings
from bimamba_lit.training.record import SaveConfig, write_run_summary
from bimamba_lit.training.run_folder import LAST_CHECKPOINT, RunFolder, choose_run_folder

COMMANDS = {
    "fit": "Train a teacher or distill a student, as a recipe says.",
    "validate": "Measure a model on a recipe's validation text and write its summary.",
    "test": "Measure a model on a recipe's test text.",
}
_GROUPS: dict[str, Any] = {
    "trainer": lightning.Trainer,
    "checkpoint": ModelCheckpoint,
    "model": type[lightning.LightningModule],
    "data": type[lightning.LightningDataModule],
    "seed_everything": bool | int,
    "ckpt_path": str | None,
    "weights_only": bool | None,
    "verbose": bool,
}
_HELP = ("-h", "--help", "--print_config")


def run(command: str, args: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        command: Which.
        args: The arguments after it.

    Raises:
        UserError: If a setting, a file or the run folder is not right.
    """
    if not any(arg.split("=")[0] in _HELP or arg.split("=")[0].endswith(".help") for arg in args):
        settings = read_settings(args)
        if "model" not in settings:
            raise UserError(f"{command} needs a recipe: bimamba {command} -c recipes/NAME.yaml")
        check_settings(settings, _GROUPS)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_wanted_line)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # the run folder is ours: see run_folder
    _one_command(command)([command, *args])


def _wanted_line(record: logging.LogRecord) -> bool:
    """Drop Lightning's advertisement of another package; keep the rest."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def _one_command(command: str) -> type["CommandLine"]:
    """Return a command line that builds the parser of one command only: each takes part of a second."""
    skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
    return type("CommandLine", (CommandLine,), {"subcommands": staticmethod(lambda: {command: skipped})})


class CommandLine(LightningCLI):
    """LightningCLI as the module's docstring tells."""

    run_folder: RunFolder

    def __init__(self, args: Sequence[str]) -> None:
        # Else Lightning warns that the arguments are given twice.
        sys.argv = sys.argv[:1]
        options = {"parser_mode": "omegaconf", "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={args[0]: options, "exit_on_error": False, "prog": "bimamba"},
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the checkpoint a top-level key."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "last", "checkpoint.enable_version_counter": False})

    def _parse_ckpt_path(self) -> None:
        """Do nothing: what the command line says counts, not what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and point everything that writes to it."""
        config = self.config[self.subcommand]
        base = Path(config.trainer.default_root_dir or Path("runs") / "unnamed")
        parser = self._subcommand_parsers[self.subcommand]
        self.recipe = yaml.safe_load(parser.dump(config, skip_none=False))
        self.run_folder = choose_run_folder(base, self.recipe, str(self.subcommand), config.ckpt_path)
        config.trainer.default_root_dir = str(self.run_folder.path)
        config.ckpt_path = None if self.run_folder.checkpoint is None else str(self.run_folder.checkpoint)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.run_folder.path / LAST_CHECKPOINT.parent)
        for key in ("trainer", "checkpoint"):
            self.recipe[key] = yaml.safe_load(parser.dump(config, skip_none=False))[key]
        self.recipe["checkpoint"]["dirpath"] = None
        self.recipe.pop("ckpt_path", None)
        if self.run_folder.notice:
            print(self.run_folder.notice)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Build the trainer with the callbacks and loggers that every run has."""
        config = self._get(self.config_init, "trainer")
        if not config.fast_dev_run:
            kwargs["logger"] = self._loggers(config.logger)
        trainer = super().instantiate_trainer(**kwargs)
        present = tuple(type(callback) for callback in trainer.callbacks)
        for callback in self._standing_callbacks(config):
            if not any(issubclass(one, type(callback)) for one in present):
                trainer.callbacks.append(callback)
        trainer.callbacks = trainer._callback_connector._reorder_callbacks(trainer.callbacks)
        return trainer

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """Return the loggers: ``metrics.csv`` always, beside it those of the recipe or else TensorBoard."""
        if configured is False:
            return False
        named = configured if isinstance(configured, list) else [configured]
        named = [logger for logger in named if isinstance(logger, Logger)]
        if self.subcommand != "fit":
            return named or False
        folder = self.run_folder.path
        return [CSVLogger(folder), *(named or [TensorBoardLogger(folder, name="tensorboard", version="")])]

    def _standing_callbacks(self, config: Any) -> list[Callback]:
        every = config.log_every_n_steps or 50
        callbacks: list[Callback] = [SaveConfig(self.recipe), NonFiniteGuard(), Throughput(every), RandomState()]
        if config.enable_progress_bar is not False:
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else ProgressLines(every))
        return callbacks

    def after_fit(self) -> None:
        """Measure the trained model, unless the last step was a validation, and write the summary."""
        if not isinstance(self.model, LanguageModule) or self.trainer.fast_dev_run or self.trainer.interrupted:
            return
        if self.model.evaluated.get("step") != self.trainer.global_step:
            steps = self.trainer.global_step
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.model.evaluated["step"] = steps
        self._write_summary()

    def after_validate(self) -> None:
        """Write the summary."""
        if isinstance(self.model, LanguageModule) and not self.trainer.fast_dev_run:
            self._write_summary()

    def _write_summary(self) -> None:
        write_run_summary(self.trainer, self.model, self.datamodule, self.run_folder.path, self.recipe)
