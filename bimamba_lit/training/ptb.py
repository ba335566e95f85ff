"""Post-training binarization as a run: its fit is the calibration, one step long."""

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar

from bimamba_lit.binarize import TARGETS, quantized_layers
from bimamba_lit.binarize.ptb import PTBScheme, calibrate_
from bimamba_lit.binarize.ptb.layer import PREFIX
from bimamba_lit.distill import load_teacher
from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import build, copy_in_fp32
from bimamba_lit.models.count import FULL_PRECISION, count_parameters, storage_by_part
from bimamba_lit.training.language import Batch, LanguageModule


class PTB(LanguageModule):
    """Binarizes a trained model layer by layer on calibration text, without training (``bimamba_lit.binarize.ptb``).

    The calibration text is the first sequences of the training batches. The fit ends after the optimizer step that
    stands for the calibration, whatever ``trainer.max_steps`` says.

    Args:
        teacher: The model to binarize, which the result is compared with: a run folder, a checkpoint, a folder that
            ``MambaLM.from_pretrained`` takes, or ``hub:OWNER/NAME``.
        scheme: The scheme: a class of ``bimamba_lit.binarize.ptb`` or of your own, with its options.
        sequences: Sequences of calibration text; a scheme that needs none, such as ``Sign``, takes none.
        targets: Layers to binarize: fnmatch patterns on their dotted names or on the last part of them; a pattern after
            ``!`` leaves out layers that others take.
    """

    def __init__(
        self,
        teacher: str,
        scheme: PTBScheme,
        sequences: int = 128,
        targets: list[str] = list(TARGETS),  # noqa: B006  (shown as the default in --help; never changed)
    ) -> None:
        super().__init__(teacher=teacher)
        if sequences < 1:
            raise UserError(f"model.sequences: {sequences} is out of range, the least is 1")
        self.automatic_optimization = False
        self.scheme = scheme
        self.sequences = sequences
        self.targets = targets
        self._text: list[Batch] = []

    def configure_model(self) -> None:
        """Load the model to binarize, and a copy of it to compare with.

        Raises:
            UserError: If it is no Mamba model.
        """
        if self._teacher:
            return
        assert self.teacher_path is not None
        teacher = load_teacher(self.teacher_path, *self.data_vocabulary())
        if not isinstance(teacher, MambaLM):
            raise UserError(
                f"model.teacher: {self.teacher_path} is no Mamba model; bimamba_lit.binarize.ptb.calibrate_ takes any"
            )
        self._teacher.append(teacher)
        self.take(copy_in_fp32(teacher))

    def configure_optimizers(self) -> None:
        """Return nothing: there is nothing to optimize."""

    def on_fit_start(self) -> None:
        """Make the fit one step long.

        Raises:
            UserError: If there is more than one device.
        """
        if self.trainer.world_size > 1:
            raise UserError(f"trainer.devices: calibration runs on one device, not on {self.trainer.world_size}")
        self.trainer.fit_loop.epoch_loop.max_steps = 1

    def training_step(self, batch: Batch) -> None:
        """Keep a batch of calibration text; calibrate as soon as there is enough of it.

        Raises:
            UserError: If the training text is too short, or a layer cannot be fitted.
        """
        wanted = self.sequences - sum(len(kept["input_ids"]) for kept in self._text)
        batch |= {name: values[:wanted] for name, values in batch.items()}  # Throughput does not count what is left out
        self._text.append({name: batch[name] for name in ("input_ids", "seq_idx") if name in batch})
        there = self.sequences - wanted + len(batch["input_ids"])
        enough = there == self.sequences or not self.scheme.needs_hessian
        if enough or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._calibrate()
        elif self.trainer.is_last_batch:
            raise UserError(
                f"model.sequences: {self.sequences} are wanted and the training text has {there}: give a longer text, "
                "a smaller context or fewer sequences"
            )

    def _calibrate(self) -> None:
        shown = self.trainer.progress_bar_callback
        bar = shown.progress if isinstance(shown, RichProgressBar) else None
        if bar is not None:  # a terminal has room for one live display
            bar.stop()
        calibrate_(self.lm, self.scheme, self._text, targets=self.targets, progress=True)
        if bar is not None:
            bar.start()
        self._text = []
        storage = storage_by_part(self.lm)
        bits = sum(storage.values()) - storage[FULL_PRECISION]
        self.log("ptb/bits_per_weight", bits / count_parameters(self.lm).binarized, prog_bar=True)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()

    def on_validation_start(self) -> None:
        """Refuse to measure a model that is not binarized yet."""
        self._refuse_full_precision()

    def on_test_start(self) -> None:
        """Refuse to measure a model that is not binarized yet."""
        self._refuse_full_precision()

    def _refuse_full_precision(self) -> None:
        if self.trainer.state.fn != "fit" and not any(quantized_layers(self.lm)):
            raise UserError(
                "nothing is calibrated yet: run `bimamba fit` with this recipe first, then add --ckpt_path last"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the layers that a checkpoint of this run holds.

        Raises:
            UserError: If the checkpoint holds another architecture or scheme than the recipe names.
        """
        layers = checkpoint.get("lm", {}).get("binarization", [])
        mine = {"scheme": PREFIX + type(self.scheme).__name__, "options": self.scheme.options()}
        held = [{name: layer.get(name) for name in mine} for layer in layers]
        if held and all(one == mine for one in held):
            self.lm = build(checkpoint["lm"]).to(self.device)
        super().on_load_checkpoint(checkpoint)
