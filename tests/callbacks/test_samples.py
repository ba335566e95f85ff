from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from bimamba_lit.callbacks import Samples
from bimamba_lit.callbacks.samples import up_to, visible
from bimamba_lit.errors import UserError
from bimamba_lit.models.generate import generate

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Final(pl.Callback):
    """Keeps the loss of every batch and the modes of all modules after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: list[list[bool]] = []
        self.drawn = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.lm.backbone.norm_f.eval()

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.modes.append([module.training for module in pl_module.modules()])
        self.drawn = torch.rand(()).item()


def test_the_text_is_the_models_continuation(tiny: SimpleNamespace, tmp_path: Path) -> None:
    module, data = tiny.module(), tiny.data()
    samples = Samples(["def ", "x"], max_new_tokens=6, temperature=0.5, every_n_steps=3, seed=7)
    tiny.trainer(tmp_path, [samples], max_steps=3).fit(module, data)
    text = (tmp_path / "samples.md").read_text()
    assert text.startswith("# Samples\n\n## Step 3\n\n")
    for prompt in ("def ", "x"):
        ids = torch.tensor([data.tokenizer.encode(prompt)])
        out = generate(module.lm, ids, 6, 0.5, torch.Generator().manual_seed(7))[0, len(prompt) :].tolist()
        assert len(out) == 6
        expected = visible(data.tokenizer.decode(out)).replace("\n", "\n    ")
        assert f"Prompt:\n\n    {prompt}\n\nContinuation:\n\n    {expected}\n" in text


def test_training_is_not_disturbed(tiny: SimpleNamespace, tmp_path: Path) -> None:
    runs = []
    for folder, callbacks in (("plain", []), ("sampling", [Samples("a", 4, every_n_steps=1)])):
        final, module = Final(), tiny.module()
        torch.manual_seed(3)
        tiny.trainer(tmp_path / folder, [*callbacks, final], max_steps=4).fit(module, tiny.data())
        runs.append((final.losses, final.modes, final.drawn))
    assert runs[0] == runs[1]
    # The one module put into evaluation mode is still the only one that is.
    assert all(modes.count(False) == 1 for modes in runs[1][1])
    assert (tmp_path / "sampling" / "samples.md").exists()


def test_a_resume_cuts_the_file_back_and_a_fresh_run_starts_it_anew(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def run(folder: str, steps: int, ckpt: Path | None = None, save: bool = False) -> str:
        trainer = tiny.trainer(tmp_path / folder, [Samples("ab", 5, every_n_steps=2)], max_steps=steps)
        trainer.fit(tiny.module(), tiny.data(), ckpt_path=ckpt, weights_only=True)
        if save:
            trainer.save_checkpoint(tmp_path / "kept.ckpt")
        return (tmp_path / folder / "samples.md").read_text()

    whole = run("whole", 8)
    assert whole.count("## Step") == 4
    run("cut", 5, save=True)
    run("cut", 8, tmp_path / "kept.ckpt")
    assert run("cut", 8, tmp_path / "kept.ckpt") == whole
    assert run("cut", 8) == whole


def test_a_sample_cannot_forge_a_heading_or_hide_characters() -> None:
    assert visible("a\x1b[2J\r\n\tb\u202e\u2028é") == "a\\x1b[2J\\r\n\tb\\u202e\\u2028é"
    text = "# Samples\n\n## Step 1\n\nPrompt:\n\n    x\n    ## Step 9\n\n## Step 5\n\nlater\n"
    assert up_to(text, 4) == "# Samples\n\n## Step 1\n\nPrompt:\n\n    x\n    ## Step 9\n"
    assert up_to(text, 5) == text


def test_control_characters_of_the_model_are_written_as_escapes(tiny: SimpleNamespace, tmp_path: Path) -> None:
    module = tiny.module()
    with torch.no_grad():  # token 0, an escape character here, always wins
        module.lm.backbone.norm_f.weight.zero_()
    module.lr = 0.0
    tiny.trainer(tmp_path, [Samples("a", 2, temperature=0, every_n_steps=1)], max_steps=1).fit(module, tiny.data())
    text = (tmp_path / "samples.md").read_text()
    assert "    \\x1b\\x1b\n" in text
    assert "\x1b" not in text


def test_loggers_that_take_text_get_it(tiny: SimpleNamespace, tmp_path: Path) -> None:
    class TextLogger(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[tuple[str, str, int]] = []

        @property
        def experiment(self) -> Any:
            return SimpleNamespace(add_text=lambda *args: self.texts.append(args))

    logger = TextLogger()
    tiny.trainer(tmp_path, [Samples("abc", 3, every_n_steps=2)], max_steps=2, logger=logger).fit(
        tiny.module(), tiny.data()
    )
    ((tag, text, step),) = logger.texts
    assert (tag, step) == ("samples", 2)
    assert text in (tmp_path / "samples.md").read_text()


def test_what_cannot_work_is_told_before_the_first_step(tiny: SimpleNamespace, tmp_path: Path) -> None:
    bare = tiny.data()
    del bare.tokenizer
    with pytest.raises(UserError, match="needs a data module with a tokenizer"):
        tiny.trainer(tmp_path, [Samples("a")], max_steps=1).fit(tiny.module(), bare)
    with pytest.raises(UserError, match="prompt '' has no token"):
        tiny.trainer(tmp_path, [Samples(["a", ""])], max_steps=1).fit(tiny.module(), tiny.data())
    with pytest.raises(UserError, match="Samples: every_n_steps is 0"):
        Samples("a", every_n_steps=0)
