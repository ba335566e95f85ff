"""A tiny binary language model, its data and its trainer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchdata.stateful_dataloader import StatefulDataLoader

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_

VOCABULARY, LENGTH, BATCH = 32, 10, 2


class TinyModule(pl.LightningModule):
    """``lm`` is a Mamba-2 of one layer; ``scheme=None`` leaves it in full precision."""

    def __init__(self, scheme: Callable[[nn.Linear], Any] | None = FBI, lr: float = 0.02) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=VOCABULARY, d_model=12, n_layer=1, d_state=8, headdim=8, chunk_size=8)
        self.lm = MambaLM(config)
        if scheme is not None:
            binarize_(self.lm, scheme)
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.lm(batch["input_ids"]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.lm(batch["input_ids"]).logits
        self.log("val/loss", cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.lm.parameters(), lr=self.lr)


class Letters:
    """One token a character, as the tokenizers of the package have it."""

    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("\x1b" if i == 0 else chr(96 + i) for i in ids)


class TinyData(pl.LightningDataModule):
    def __init__(self, batches: int = 40) -> None:
        super().__init__()
        self.tokenizer = Letters()
        self.batches = batches

    def _loader(self, seed: int, batches: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (batches * BATCH, LENGTH + 1), generator=generator)
        rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]
        return StatefulDataLoader(rows, batch_size=BATCH)

    def train_dataloader(self) -> Any:
        return self._loader(1, self.batches)

    def val_dataloader(self) -> Any:
        return self._loader(2, 2)


def make_trainer(folder: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=callbacks, **{**defaults, **options})


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(module=TinyModule, data=TinyData, trainer=make_trainer, tokens_a_batch=BATCH * LENGTH)
