"""Training a full-precision language model: the teacher."""

from dataclasses import replace

from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaConfig, MambaLM
from bimamba_lit.training.language import Batch, LanguageModule
from bimamba_lit.training.optimizer import AdamW


class Pretrain(LanguageModule):
    """Trains a Mamba language model in full precision on next-token prediction.

    Args:
        config: The architecture. Its vocabulary follows the data's tokenizer and need not be given.
        optimizer: AdamW and its schedule.
        activation_checkpointing: Compute activations inside blocks again in the backward pass, to save memory.
        compile: Compile the blocks with ``torch.compile``.
    """

    def __init__(
        self,
        config: MambaConfig,
        optimizer: AdamW | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, activation_checkpointing=activation_checkpointing, compile=compile)
        self.config = config

    def configure_model(self) -> None:
        """Build the model once the data's vocabulary is known."""
        if not hasattr(self, "lm"):
            self.take(MambaLM(with_vocabulary(self.config, self.data_vocabulary()[0])))

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch, in nats a token."""
        loss = ops.distillation_loss(*self.student_output(batch), labels=batch["labels"], hard_share=1.0)
        return self.log_loss(loss)


def with_vocabulary(config: MambaConfig, vocab_size: int | None) -> MambaConfig:
    """Return ``config`` with the data's vocabulary.

    Raises:
        UserError: If the config asks for another vocabulary than the data has.
    """
    if vocab_size is None:
        return config
    if config.vocab_size not in (None, vocab_size):
        raise UserError(
            f"the config says vocab_size {config.vocab_size} but the data's tokenizer has {vocab_size} tokens: "
            "leave vocab_size out, it follows the data"
        )
    return replace(config, vocab_size=vocab_size)
