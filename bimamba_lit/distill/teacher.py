"""Loading the frozen teacher and checking that a student can learn from it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bimamba_lit.distill.causal_teacher import CausalTeacher
from bimamba_lit.errors import UserError
from bimamba_lit.hub import hub_folder, hub_name
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json
from bimamba_lit.models.transformers_folder import is_transformers_mamba

# Tables are padded to a multiple that suits the hardware; more rows than this are another vocabulary.
_MOST_PADDING = 255
_PROBE = "Some words,  12 of them\n\n\tand été 中文 <|endoftext|>."


def load_teacher(
    path: str | Path, vocab_size: int | None = None, tokenizer_json: str | None = None
) -> MambaLM | CausalTeacher:
    """Load a teacher, frozen and in evaluation mode.

    The table of a teacher of another program may have up to 255 rows more than the data's tokenizer has tokens, as
    tables are often padded: its vocabulary is then cut to the data's.

    Args:
        path: A run folder, a Lightning checkpoint of this project, a folder that ``MambaLM.from_pretrained`` takes, the
            folder of any causal language model of transformers, or ``hub:OWNER/NAME`` for one on the Hugging Face hub.
        vocab_size: The vocabulary of the data that the student is to be trained on.
        tokenizer_json: The tokenizer of that data; compared with the teacher's own where the teacher carries one.

    Raises:
        UserError: If the teacher cannot be read, or its vocabulary or tokenizer is not that of the data.
    """
    checkpoint = find_checkpoint(path)
    config = _others_config(checkpoint)
    causal = isinstance(config.get("model_type"), str) and not is_transformers_mamba(config)
    teacher = CausalTeacher(checkpoint) if causal else load_lm(checkpoint)
    own = load_tokenizer_json(checkpoint)
    if vocab_size is not None:
        _fit_vocabulary(teacher, vocab_size, path, may_be_padded=bool(config))
    if own is not None and tokenizer_json is not None and not _same_tokenizer(own, tokenizer_json):
        raise UserError(
            f"the teacher {path} was trained with another tokenizer than the data's, though both have "
            f"{teacher.config.vocab_size} tokens: set data.init_args.tokenizer to {path} to take the teacher's"
        )
    return teacher.eval().requires_grad_(False)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint to load for ``path``: of a run folder its ``checkpoints/last.ckpt``, else ``path`` itself.

    Raises:
        UserError: If ``path`` is a run folder without a checkpoint, or a hub name that cannot be fetched.
    """
    if (name := hub_name(str(path))) is not None:
        return hub_folder(name)
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        return folder
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        raise UserError(f"the run {folder} has no checkpoint yet: {last} is missing")
    return last


def _others_config(path: Path) -> dict[str, Any]:
    """Return the content of another program's ``config.json``, and nothing for anything else."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # load_lm tells what is wrong
    return config if isinstance(config, dict) and "format" not in config else {}


def _fit_vocabulary(teacher: MambaLM | CausalTeacher, vocab_size: int, path: str | Path, may_be_padded: bool) -> None:
    rows = teacher.config.vocab_size
    assert rows is not None
    if rows == vocab_size:
        return
    if not may_be_padded or not 0 < rows - vocab_size <= _MOST_PADDING:
        raise UserError(
            f"the teacher {path} has a vocabulary of {rows} tokens but the data's tokenizer has "
            f"{vocab_size}: teacher and student must share one"
        )
    if isinstance(teacher, MambaLM):
        # The table stays as it is; the rows that are cut become its padding.
        teacher.config = replace(teacher.config, vocab_size=vocab_size, pad_vocab_size_multiple=rows)
        teacher.backbone.vocab_size = vocab_size
    else:
        teacher.config.vocab_size = vocab_size


def _same_tokenizer(one: str, other: str) -> bool:
    """Tell whether two tokenizer definitions give the same ids, however their JSON is written."""
    if one == other:
        return True
    from tokenizers import Tokenizer

    try:
        both = [Tokenizer.from_str(definition) for definition in (one, other)]
    except Exception:  # tokenizers raises Exception itself; a byte tokenizer's definition is none of its own
        return False
    first, second = ((t.get_vocab(), t.encode(_PROBE, add_special_tokens=False).ids) for t in both)
    return first == second
