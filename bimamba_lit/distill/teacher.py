"""Loading the frozen teacher and checking that a student can learn from it."""

from pathlib import Path

from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json


def load_teacher(path: str | Path, vocab_size: int | None = None, tokenizer_json: str | None = None) -> MambaLM:
    """Load a teacher, frozen and in evaluation mode.

    Args:
        path: A run folder, a Lightning checkpoint of this project, or a folder that ``MambaLM.from_pretrained`` takes.
        vocab_size: The vocabulary of the data that the student is to be trained on.
        tokenizer_json: The tokenizer of that data; compared with the teacher's own where the teacher carries one.

    Raises:
        UserError: If the teacher cannot be read, or its vocabulary or tokenizer is not that of the data.
    """
    checkpoint = find_checkpoint(path)
    teacher = load_lm(checkpoint)
    if vocab_size is not None and teacher.config.vocab_size != vocab_size:
        raise UserError(
            f"the teacher {path} has a vocabulary of {teacher.config.vocab_size} tokens but the data's tokenizer has "
            f"{vocab_size}: teacher and student must share one"
        )
    own = load_tokenizer_json(checkpoint)
    if own is not None and tokenizer_json is not None and own != tokenizer_json:
        raise UserError(
            f"the teacher {path} was trained with another tokenizer than the data's, though both have "
            f"{teacher.config.vocab_size} tokens: set data.init_args.tokenizer to the teacher's"
        )
    return teacher.eval().requires_grad_(False)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint to load for ``path``: of a run folder its ``checkpoints/last.ckpt``, else ``path`` itself.

    Raises:
        UserError: If ``path`` is a run folder without a checkpoint.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        return folder
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"the run {folder} has no checkpoint yet: {last} is missing")
    return last
