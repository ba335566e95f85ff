"""What a run leaves behind beside its checkpoints: ``config.yaml`` and ``summary.json``."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities import rank_zero_only

import bimamba_lit
from bimamba_lit.callbacks import Throughput
from bimamba_lit.files import replacing
from bimamba_lit.models.count import count_parameters, storage_by_part
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.report.summary import Summary, write_summary
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


@rank_zero_only
def write_run_summary(
    trainer: pl.Trainer,
    module: LanguageModule,
    data: Any,
    folder: Path,
    recipe: dict[str, Any],
) -> None:
    """Write ``summary.json`` from the newest evaluation of ``module`` and the totals of its training.

    Args:
        trainer: The trainer that has just fitted or validated.
        module: The module.
        data: The data module that the evaluation text came from.
        folder: The run folder.
        recipe: The configuration, for the seed.
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
        teacher=None if module.teacher_path is None else os.path.relpath(module.teacher_path),
        version=bimamba_lit.__version__,
    )
    write_summary(folder, summary)
