"""Text that the model writes while it learns."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from bimamba_lit.callbacks.sharded import gathered
from bimamba_lit.callbacks.steps import EverySteps
from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing
from bimamba_lit.models.generate import generate


class Samples(pl.Callback):
    """Lets the model continue prompts during training and appends the text to ``samples.md`` in the run folder.

    Every time starts from the same seed in a generator of its own, so that samples of different steps differ by the
    model alone and training's random state is not touched. The tokenizer is ``trainer.datamodule.tokenizer``. Control
    characters are written as escapes. Loggers that take text (TensorBoard) get the same. A resumed run cuts the file
    back to the step it resumes from; a fresh one starts it anew.

    Args:
        prompt: The text to continue, or several, each continued by itself.
        max_new_tokens: Tokens to add to each prompt.
        temperature: Logits are divided by it; 0 takes the most likely token.
        every_n_steps: Optimizer steps from one time to the next.
        seed: Seed of the generator.

    Raises:
        UserError: If ``every_n_steps`` is less than 1, the data module has no tokenizer, or a prompt is of no token.
    """

    def __init__(
        self,
        prompt: str | list[str],
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        every_n_steps: int = 500,
        seed: int = 0,
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.every_n_steps = every_n_steps
        self.seed = seed
        self._steps = EverySteps(self, every_n_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the prompts and cut ``samples.md`` back to the step that training starts at."""
        self._steps.start(trainer)
        if not hasattr(getattr(trainer, "datamodule", None), "tokenizer"):
            raise UserError("Samples needs a data module with a tokenizer, such as bimamba_lit.data.TextDataModule")
        for prompt in self._prompts():
            if not len(_tokenizer(trainer).encode(prompt)):
                raise UserError(f"Samples: the prompt {prompt!r} has no token to start from; give it at least one")
        path = _path(trainer)
        if not trainer.is_global_zero or not path.exists():
            return
        if trainer.global_step == 0:
            path.unlink()
        else:
            _write(path, up_to(path.read_text(encoding="utf-8"), trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Write samples at the steps that are multiples of ``every_n_steps``."""
        if not self._steps.due(trainer):
            return
        # Every rank generates: with sharded parameters a forward pass needs them all.
        text = "\n".join(self._continued(trainer, pl_module, prompt) for prompt in self._prompts())
        if not trainer.is_global_zero:
            return
        path = _path(trainer)
        before = path.read_text(encoding="utf-8") if path.exists() else "# Samples\n"
        _write(path, f"{before}\n## Step {trainer.global_step}\n\n{text}")
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                add_text("samples", text, trainer.global_step)

    def _prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def _continued(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prompt: str) -> str:
        lm: Any = pl_module.lm
        tokenizer = _tokenizer(trainer)
        ids = torch.tensor([tokenizer.encode(prompt)], device=lm.device)
        generator = torch.Generator(lm.device).manual_seed(self.seed)
        with gathered(pl_module):
            out = generate(lm, ids, self.max_new_tokens, self.temperature, generator)
        continuation = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        return f"Prompt:\n\n{_as_code(prompt)}\n\nContinuation:\n\n{_as_code(continuation)}\n"


def visible(text: str) -> str:
    r"""Return ``text`` with escapes (``\x1b``) for the characters that do not print, line feeds and tabs excepted."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _as_code(text: str) -> str:
    # Indented by four spaces: whatever the text holds, no line of it can be a heading or close the block.
    return "\n".join(f"    {line}" for line in visible(text).split("\n"))


def up_to(text: str, step: int) -> str:
    """Return the text of a ``samples.md`` without the sections of steps after ``step``."""
    for heading in re.finditer(r"^## Step (\d+)$", text, flags=re.MULTILINE):
        if int(heading[1]) > step:
            return text[: heading.start()].removesuffix("\n")
    return text


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _path(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "samples.md"


def _tokenizer(trainer: pl.Trainer) -> Any:
    return trainer.datamodule.tokenizer  # type: ignore[attr-defined]
