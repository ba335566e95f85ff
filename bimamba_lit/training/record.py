"""What a run leaves behind beside its checkpoints: ``config.yaml`` and ``summary.json``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities import rank_zero_only

import bimamba_lit
from bimamba_lit.callbacks import Throughput
from bimamba_lit.data import TextDataModule
from bimamba_lit.data.source import as_sources
from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing
from bimamba_lit.models.count import count_parameters, storage_by_part
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.report.summary import Summary, TextResult, write_summary
from bimamba_lit.training.language import LanguageModule, scheme_name
from bimamba_lit.training.run_folder import CONFIG


class SaveConfig(pl.Callback):
    """Writes ``config.yaml`` when a run begins, after all its input has proved good; ``-c`` takes it as a recipe.

    Args:
        recipe: The whole configuration, as plain values.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; a summary of an earlier, shorter run in this folder is out of date from here on."""
        self._save(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (Path(trainer.default_root_dir) / SUMMARY).unlink(missing_ok=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file where the run is a validation by itself."""
        if trainer.state.fn == "validate" and not (Path(trainer.default_root_dir) / CONFIG).exists():
            self._save(trainer)

    @rank_zero_only
    def _save(self, trainer: pl.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with replacing(Path(trainer.default_root_dir) / CONFIG) as temporary:
                temporary.write_text(yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def find_tests(texts: Sequence[str]) -> None:
    """Raise, before anything is trained, if one of the texts to measure on at the end cannot be found.

    Raises:
        UserError: As it says.
    """
    for text in texts:
        for source in as_sources(text, "tests"):
            source.parts("tests", streaming=True)


def measure_tests(trainer: pl.Trainer, module: LanguageModule, data: Any, texts: Sequence[str]) -> list[TextResult]:
    """Measure a model on texts as the data module reads its own, and leave what validation found as it is.

    Args:
        trainer: The trainer that has just fitted or validated.
        module: The module.
        data: The data module.
        texts: The texts, as ``data.test`` takes them.

    Raises:
        UserError: If the data module takes no texts.
    """
    if texts and not isinstance(data, TextDataModule):
        raise UserError(f"tests: {type(data).__name__} takes no texts to test on; bimamba_lit.data.TextDataModule does")
    found: list[TextResult] = []
    validated = module.evaluated
    for text in texts:
        measured = data.testing_on(text)
        trainer.test(module, measured, verbose=False)
        figures = module.evaluated
        found.append(
            TextResult(**measured.eval_data, bits_per_byte=figures["bits_per_byte"], perplexity=figures["perplexity"])
        )
    module.evaluated = validated
    return found


@rank_zero_only
def write_run_summary(
    trainer: pl.Trainer,
    module: LanguageModule,
    data: Any,
    folder: Path,
    recipe: dict[str, Any],
    tests: Sequence[TextResult] = (),
) -> None:
    """Write ``summary.json`` from the newest evaluation of ``module`` and the totals of its training.

    Args:
        trainer: The trainer that has just fitted or validated.
        module: The module.
        data: The data module that the evaluation text came from.
        folder: The run folder.
        recipe: The configuration, for the seed.
        tests: What it makes of other texts.
    """
    progress = next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
    params, binarized = count_parameters(module.lm)
    storage = storage_by_part(module.lm)
    figures = module.evaluated
    summary = Summary(
        name=folder.name,
        scheme=scheme_name(module.lm, trained=progress.tokens_seen > 0),
        bits_per_byte=figures["bits_per_byte"],
        perplexity=figures["perplexity"],
        agreement=figures.get("agreement"),
        eval_data=dict(data.eval_data),
        context=data.context,
        stride=data.stride,
        params=params,
        binarized_params=binarized,
        true_bits=sum(storage.values()),
        storage=storage,
        tokens_seen=progress.tokens_seen,
        seconds=progress.seconds,
        seed=recipe.get("seed_everything"),
        teacher=None if module.taught_by is None else os.path.relpath(module.taught_by),
        version=bimamba_lit.__version__,
        tests=tests,
    )
    write_summary(folder, summary)
