"""What training a teacher, distilling a student and post-training binarization have in common."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bimamba_lit.binarize import binary_layers, quantized_layers, take_unfinished_
from bimamba_lit.binarize.ptb.layer import PREFIX
from bimamba_lit.errors import UserError
from bimamba_lit.eval import LanguageMetrics
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import describe
from bimamba_lit.training.activations import checkpoint_blocks_, compile_blocks_
from bimamba_lit.training.checkpoint_check import check_loops, check_optimizers
from bimamba_lit.training.optimizer import AdamW
from bimamba_lit.training.sharding import ShardedTeacher, shard_

Batch = dict[str, Tensor]


class LanguageModule(pl.LightningModule):
    """A language model in training: optimizer, evaluation and checkpoints; subclasses build it and give the loss.

    Args:
        optimizer: The optimizer and its schedule.
        teacher: The path of the frozen teacher that evaluation compares with; None without one.
        activation_checkpointing: Compute activations inside blocks again in the backward pass, to save memory.
        compile: Compile the blocks with ``torch.compile``.

    Attributes:
        lm: The model being trained, there once ``configure_model`` has run.
        evaluated: The figures of the newest evaluation by name, and under ``step`` when it was.
        has_begun: Whether a batch has been trained or measured on.
    """

    lm: MambaLM

    def __init__(
        self,
        optimizer: AdamW | None = None,
        teacher: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.optimizer_settings = optimizer or AdamW()
        self.teacher_path = teacher
        # Not a submodule: neither the optimizer, nor checkpoints, nor a strategy that shards or syncs may see it.
        self._teacher: list[Any] = []
        self.metrics = LanguageMetrics(with_teacher=teacher is not None)
        self.evaluated: dict[str, float] = {}
        self.has_begun = False

    @property
    def teacher(self) -> Any:
        """The frozen teacher, on the device of this module."""
        (teacher,) = self._teacher
        if teacher.device != self.device:
            teacher.to(self.device)
        return teacher

    @property
    def taught_by(self) -> str | None:
        """The path of the teacher; None without one."""
        return self.teacher_path

    def data_vocabulary(self) -> tuple[int | None, str | None]:
        """Return the vocabulary size and the tokenizer (as JSON) of the data module; ``None`` where there is none."""
        data = getattr(self._trainer, "datamodule", None)
        if data is None or not hasattr(data, "tokenizer"):
            return None, None
        return data.vocab_size, data.tokenizer.to_json()

    def take(self, lm: MambaLM) -> None:
        """Make ``lm`` the model in training: compiled, with activation checkpointing and sharded, where asked for.

        Raises:
            UserError: If the strategy asks for tensor parallelism, or the precision would round latent weights.
        """
        _refuse_rounded_latents(lm, getattr(self._trainer, "precision", None))
        self.lm = lm
        if self.compile_blocks:
            compile_blocks_(lm)
        if self.activation_checkpointing:
            checkpoint_blocks_(lm)
        if self.device_mesh is not None:
            shard_(self, self.device_mesh)

    def student_output(self, batch: Batch, residuals: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states ``(B, L, D)`` and the head ``(V, D)`` of the model in training.

        Args:
            batch: Token ids and, if documents are kept apart, which one each is of.
            residuals: Filled with the residual stream ``(B, L, D)`` after each block.
        """
        hidden = self.lm.backbone(batch["input_ids"], seq_idx=batch.get("seq_idx"), residuals=residuals)
        return hidden, self.lm.head_weight

    def configure_optimizers(self) -> Any:
        """Build AdamW and its schedule for the trained model."""
        return self.optimizer_settings.build(self.lm, self.trainer.max_steps)

    def log_loss(self, loss: Tensor, **parts: Tensor) -> Tensor:
        """Log the training loss, in nats a token, what it is made of by name, and the learning rates; return it.

        The losses that are logged are the means over all devices.
        """
        if not torch.is_grad_enabled():  # NonFiniteGuard runs the batch again, on this device alone
            return loss
        rates = self.optimizer_settings.rates(self.trainer.optimizers[0])
        shown = {name: value.detach().clone() for name, value in ({"loss": loss} | parts).items()}
        if (world := self.trainer.world_size) > 1:
            # Lightning's sync_dist would have every process wait for its device, at every step.
            together = torch.stack(list(shown.values())) / world
            torch.distributed.all_reduce(together)
            shown = dict(zip(shown, together, strict=True))
        self.log("train/loss", shown.pop("loss"), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in (shown | rates).items()})
        return loss

    @torch.no_grad()
    def teacher_output(self, batch: Batch, residuals: list[Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the teacher's hidden states ``(B, L, D_t)`` and head ``(V, D_t)``, or ``None`` without a teacher.

        Args:
            batch: Token ids and, if documents are kept apart, which one each is of.
            residuals: Filled with the residual stream ``(B, L, D_t)`` after each block of a teacher that is a MambaLM.
        """
        if self.teacher_path is None:
            return None
        teacher, ids, documents = self.teacher, batch["input_ids"], batch.get("seq_idx")
        if isinstance(teacher, ShardedTeacher):
            hidden, head, found = teacher(ids, documents, residuals is not None)
            if residuals is not None:
                residuals += found
            return hidden, head
        wanted = {} if residuals is None else {"residuals": residuals}
        return teacher.backbone(ids, seq_idx=documents, **wanted), teacher.head_weight

    def validation_step(self, batch: Batch) -> None:
        """Add a batch of evaluation windows to the figures."""
        self.metrics.update(
            *self.student_output(batch), batch["labels"], batch["label_bytes"], self.teacher_output(batch)
        )

    def test_step(self, batch: Batch) -> None:
        """Add a batch of test windows to the figures."""
        self.validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation text."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test text."""
        self._log_figures("test")

    def _log_figures(self, prefix: str) -> None:
        figures = self.metrics.compute()
        self.log_dict({f"{prefix}/{name}": value.float() for name, value in figures.items()}, sync_dist=False)
        self.evaluated = {name: float(value) for name, value in figures.items()} | {"step": self.global_step}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model and reads its text, so that a checkpoint stands by itself."""
        checkpoint["lm"] = describe(self.lm)
        _, checkpoint["tokenizer"] = self.data_vocabulary()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over how far the layers have come to binary, and refuse a checkpoint of another model.

        It is refused before its tensors are tried one by one.

        Raises:
            UserError: If the checkpoint holds another architecture or scheme than the recipe builds.
        """
        if not isinstance(checkpoint.get("lm"), dict):
            raise UserError("the checkpoint is not one of this project: it does not describe its model (key 'lm')")
        saved = checkpoint["lm"]
        take_unfinished_(self.lm, saved.get("binarization", []))
        built = describe(self.lm)
        differing = sorted(key for key in saved.keys() | built.keys() if saved.get(key) != built.get(key))
        if differing:
            raise UserError(
                "the checkpoint holds another model than the recipe builds: use the recipe it was trained with "
                f"(they differ in {_differences(saved, built)})"
            )
        if self._trainer is not None and self.trainer.training:  # none in load_from_checkpoint
            check_loops(self.trainer, checkpoint)

    def on_train_start(self) -> None:
        """Look at what a checkpoint left of the optimizer.

        Raises:
            UserError: If it is not of the kind that this run's is.
        """
        if self.trainer.ckpt_path is not None and (fresh := self.configure_optimizers()) is not None:
            check_optimizers(self.trainer, fresh)

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that a checkpoint, if any, has been taken up."""
        self.has_begun = True

    def on_validation_batch_start(self, *_: Any) -> None:
        """Likewise, where the run is a validation by itself."""
        self.has_begun |= not self.trainer.sanity_checking

    def on_test_batch_start(self, *_: Any) -> None:
        """Likewise."""
        self.has_begun = True


def _refuse_rounded_latents(lm: MambaLM, precision: str | None) -> None:
    """Raise where all weights would be held in half precision: there a latent weight loses its small steps."""
    if precision in ("16-true", "bf16-true") and any(True for _ in binary_layers(lm)):
        raise UserError(
            f"trainer.precision: {precision} would hold the latent weights in half precision, where small steps are "
            f"lost: set {precision.replace('true', 'mixed')}, which computes in half precision and keeps them in fp32"
        )


def _differences(saved: Any, built: Any, path: str = "") -> str:
    if isinstance(saved, dict) and isinstance(built, dict):
        keys = [key for key in saved.keys() | built.keys() if saved.get(key) != built.get(key)]
        pairs = [(f"{path}.{key}".lstrip("."), saved.get(key), built.get(key)) for key in sorted(keys, key=str)]
        return ", ".join(_differences(there, here, name) for name, there, here in pairs)
    if isinstance(saved, list):
        return path
    there, here = (text if len(text := repr(value)) <= 80 else f"{text[:77]}..." for value in (saved, built))
    return f"{path}: {there} there, {here} here"


def scheme_name(lm: MambaLM, trained: bool) -> str:
    """Return a run's scheme: ``fp``, the class name, or ``ptb.`` and it where nothing was trained after."""
    names = {str(layer.kind()["scheme"]) for _, layer in quantized_layers(lm)}
    if not trained:
        names = {PREFIX + name.removeprefix(PREFIX) for name in names}
    return "+".join(sorted(names)) or "fp"
