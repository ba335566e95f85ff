"""Autoregressive distillation: a 1-bit student learns the next-token distributions of a frozen teacher."""

import math
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize import TARGETS, LatentLinear, retrain_
from bimamba_lit.data.blocks import IGNORED
from bimamba_lit.distill import StoredTeacher, find_checkpoint, hidden_state_loss, is_stored_teacher, load_teacher
from bimamba_lit.distill.causal_teacher import CausalTeacher
from bimamba_lit.errors import UserError
from bimamba_lit.export.deploy import check_deploy
from bimamba_lit.models import MambaConfig, MambaLM
from bimamba_lit.models.checkpoint import copy_in_fp32, in_fp32, load_lm
from bimamba_lit.training.language import Batch, LanguageModule
from bimamba_lit.training.optimizer import AdamW
from bimamba_lit.training.pretrain import with_vocabulary
from bimamba_lit.training.sharding import ShardedTeacher


class Distill(LanguageModule):
    """Trains a student whose projections are binary to match a teacher's distributions (Bi-Mamba, arXiv 2411.11843).

    Args:
        teacher: A run folder, a checkpoint, a folder that ``MambaLM.from_pretrained`` takes, any local causal language
            model in transformers' format, or ``hub:OWNER/NAME``. It stays frozen. Or a folder that ``bimamba
            teacher-logits`` wrote: then there is no teacher in memory, and no agreement with it in validation.
        binarizer: The scheme: a class of ``bimamba_lit.binarize`` or of your own, with its options.
            ``null`` trains a full-precision student: the same run without the binarization.
        student: What the student starts from: an architecture, at random; ``teacher``, the weights of a teacher that is
            a Mamba model; or the path of another model, such as a run of ``PTB``, whose signs and scales are kept where
            the binarizer has the same terms (see :func:`bimamba_lit.binarize.retrain_`). In fp32 whatever that is in.
        targets: Layers to binarize: fnmatch patterns on their dotted names or on the last part of them; a pattern after
            ``!`` leaves out layers that others take.
        keep_rows: Rows of these layers that stay in full precision, by patterns of layers, such as
            ``{in_proj: [B, C, dt]}``; see :func:`bimamba_lit.binarize.binarize_`.
        double_inputs: Share of the inputs of these layers, 0 to 1, whose weights are the sum of two signs, by patterns
            of layers, such as ``{in_proj: 0.15}``: whole words of 32 inputs, those that one sign fits worst.
            A list is of shares by depth, from the first of these layers to the last: ``{out_proj: [1, 0]}`` means all
            inputs in the first half of them and none in the second.
        divergence: ``soft_ce``, the paper's cross-entropy against the teacher's distribution; ``forward_kl`` or
            ``reverse_kl``, the divergence from the teacher to the student or back.
        temperature: Divides both models' logits; the loss is multiplied by its square.
        hard_share: Share of the loss that is cross-entropy against the text itself, 0 (the paper's) to 1.
        hidden_weight: Weight of a second loss that is added: how far the residual stream is from the teacher's after
            each block, as a share of its power (:func:`bimamba_lit.distill.hidden_state_loss`); logged by itself as
            ``train/hidden``. Not 0 only with a Mamba teacher of the student's ``d_model`` and ``n_layer``.
        optimizer: AdamW and its schedule.
        activation_checkpointing: Compute activations inside blocks again in the backward pass, to save memory.
        compile: Compile the student's blocks with ``torch.compile``.
        shard_teacher: Spread the teacher over the devices too, under ``ModelParallelStrategy``; else each device holds
            it whole. On one device it changes nothing.
        deploy: Formats of ``bimamba export`` that the result must fit, such as ``[torchscript, gguf]``; checked before
            the first step.
    """

    def __init__(
        self,
        teacher: str,
        binarizer: Callable[[nn.Linear], LatentLinear] | None,
        student: MambaConfig | str = "teacher",
        targets: list[str] = list(TARGETS),  # noqa: B006  (shown as the default in --help; never changed)
        keep_rows: dict[str, list[str]] = {},  # noqa: B006  (likewise)
        double_inputs: dict[str, float | list[float]] = {},  # noqa: B006  (likewise)
        divergence: Literal["soft_ce", "forward_kl", "reverse_kl"] = "soft_ce",
        temperature: float = 1.0,
        hard_share: float = 0.0,
        hidden_weight: float = 0.0,
        optimizer: AdamW | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        shard_teacher: bool = False,
        deploy: list[str] = [],  # noqa: B006  (likewise)
    ) -> None:
        stored = is_stored_teacher(teacher)
        super().__init__(optimizer, None if stored else teacher, activation_checkpointing, compile)
        self.stored = StoredTeacher(teacher) if stored else None
        for name, value, fits, right in (
            ("temperature", temperature, 0 < temperature < math.inf, "above 0"),
            ("hard_share", hard_share, 0 <= hard_share <= 1, "0 to 1"),
            ("hidden_weight", hidden_weight, 0 <= hidden_weight < math.inf, "0 or more"),
        ):
            if not fits:
                raise UserError(f"model.{name}: {value} is out of range, it must be {right}")
        self.shard_teacher = shard_teacher
        self.binarizer = binarizer
        self.student = student
        self.targets = targets
        self.keep_rows = keep_rows
        self.double_inputs = double_inputs
        self.divergence = divergence
        self.temperature = temperature
        self.hard_share = hard_share
        self.hidden_weight = hidden_weight
        self.deploy = deploy

    def configure_model(self) -> None:
        """Load the teacher, build the student and binarize it.

        Raises:
            UserError: If the student cannot start from what it is to start from, or does not fit where it is to go; or
                the teacher is to be spread over devices by a strategy that spreads nothing.
        """
        if hasattr(self, "lm"):
            return
        if self.stored is not None:
            self._check_stored(self.stored)
            student = self._start(self.stored)
        else:
            assert self.teacher_path is not None
            teacher = load_teacher(self.teacher_path, *self.data_vocabulary())
            student = self._start(teacher)
            if self.hidden_weight:
                _check_hidden_states(student, teacher)
            self._teacher.append(self._spread(teacher))
        start = retrain_(student, self.binarizer, self.targets, self.keep_rows, self.double_inputs)
        check_deploy(student, self.deploy)
        if any(start):
            rank_zero_info(
                f"Of {self.student}, {start.exact} layers keep their signs and scales; of {start.near} the latent "
                "weights start at the quantized weight"
            )
        self.take(student)

    def _spread(self, teacher: MambaLM | CausalTeacher) -> MambaLM | CausalTeacher | ShardedTeacher:
        """Return the teacher as it is to be held: spread over the devices or whole."""
        if not self.shard_teacher or self.trainer.world_size == 1:
            return teacher
        if self.device_mesh is None:
            raise UserError(
                "model.shard_teacher: weights are spread under trainer.strategy ModelParallelStrategy only: set that, "
                "or leave the teacher whole"
            )
        return ShardedTeacher(teacher, self.device_mesh)

    @property
    def taught_by(self) -> str | None:
        """The path of the teacher, also of one whose distributions are read from disk."""
        return self.teacher_path if self.stored is None else self.stored.manifest.teacher

    def _check_stored(self, stored: StoredTeacher) -> None:
        """Raise unless what is stored is enough, and of the sequences that training will see."""
        if self.hidden_weight:
            raise UserError(
                f"model.hidden_weight: {stored.folder} holds the teacher's logits, not its hidden states: set it to 0"
            )
        data = getattr(self._trainer, "datamodule", None)
        if data is not None and self.trainer.training:
            stored.check(data.training_data(), self.temperature)

    def _start(self, teacher: MambaLM | CausalTeacher | StoredTeacher) -> MambaLM:
        """Return the student before it is binarized."""
        if isinstance(self.student, MambaConfig):
            return MambaLM(with_vocabulary(self.student, teacher.config.vocab_size))
        if self.student == "teacher":
            if isinstance(teacher, MambaLM):
                return copy_in_fp32(teacher)
            if isinstance(teacher, StoredTeacher):
                raise UserError(
                    f"model.student: {teacher.folder} holds the teacher's logits and not its weights: give the weights "
                    f"to start from, such as --model.student={teacher.manifest.teacher}"
                )
            raise UserError(
                f"model.student: the teacher {self.teacher_path} is no Mamba model, so no student can start from its "
                "weights: give the student's d_model and n_layer instead of 'teacher'"
            )
        student = in_fp32(load_lm(find_checkpoint(self.student)))
        if student.config.vocab_size != teacher.config.vocab_size:
            raise UserError(
                f"model.student: {self.student} has a vocabulary of {student.config.vocab_size} tokens and the teacher "
                f"one of {teacher.config.vocab_size}: they must share one"
            )
        return student

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch: the distillation loss, in nats a token, and that of the hidden states."""
        options: dict[str, Any] = {
            "labels": batch["labels"],
            "divergence": self.divergence,
            "temperature": self.temperature,
            "hard_share": self.hard_share,
        }
        if self.stored is not None:
            stored = self.stored.distributions(batch["sequence"].tolist())
            ids, log_probs = (tensor.to(self.device, non_blocking=True) for tensor in stored)
            return self.log_loss(ops.topk_distillation_loss(*self.student_output(batch), ids, log_probs, **options))
        ours: list[Tensor] | None = [] if self.hidden_weight else None
        theirs: list[Tensor] | None = [] if self.hidden_weight else None
        teacher = self.teacher_output(batch, theirs)
        assert teacher is not None
        loss = ops.distillation_loss(*self.student_output(batch, ours), *teacher, **options)
        if ours is None or theirs is None:
            return self.log_loss(loss)
        hidden = hidden_state_loss(ours, theirs, batch["labels"] != IGNORED)
        return self.log_loss(loss + self.hidden_weight * hidden, hidden=hidden.detach())


def _check_hidden_states(student: MambaLM, teacher: MambaLM | CausalTeacher) -> None:
    if not isinstance(teacher, MambaLM):
        raise UserError(
            "model.hidden_weight: the teacher is no Mamba model, so its blocks are not the student's: set it to 0"
        )
    ours, theirs = ((lm.config.n_layer, lm.config.d_model) for lm in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"model.hidden_weight: the student has {ours[0]} blocks of width {ours[1]} and the teacher {theirs[0]} of "
            f"width {theirs[1]}; matched block by block, they must have the same n_layer and d_model: give the student "
            "those of the teacher, or set hidden_weight to 0"
        )
