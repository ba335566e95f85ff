import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from bimamba_lit.data import TextDataModule
from bimamba_lit.data.offline import offline_files
from bimamba_lit.errors import UserError

# From Python 3.12 on a fork beside other threads warns; the loader's workers only index an array.
forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {n} of some text é\n" for n in range(400)))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(**settings: Any) -> TextDataModule:
        return TextDataModule(**{"cache_dir": str(tmp_path / "cache"), "context": 32, "batch_size": 4, **settings})

    return make


def fitted(module: TextDataModule, stage: str = "fit") -> TextDataModule:
    module.setup(stage)
    return module


@pytest.mark.parametrize("stride", [32, 9])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_evaluation_counts_all_bytes_but_each_documents_first_token(
    make: Any, texts: Path, bpe: Path, kind: str, stride: int
) -> None:
    module = fitted(make(val=str(texts), tokenizer=kind if kind == "bytes" else str(bpe), stride=stride), "validate")
    expected = tokens = 0
    for path in texts.iterdir():
        ids, sizes = module.tokenizer.encode_sizes([path.read_bytes().decode()])
        expected += path.stat().st_size - int(sizes[0][0])
        tokens += len(ids[0]) - 1
    batches = list(module.val_dataloader())
    assert sum(int(batch["label_bytes"].sum()) for batch in batches) == expected
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == tokens
    assert not any((batch["labels"] == module.tokenizer.separator).any() for batch in batches)


def test_the_offline_corpus_is_the_default(make: Any) -> None:
    module = fitted(make(max_eval_tokens=1000))
    assert module.vocab_size == 257
    assert module.eval_data["name"] == "offline/val, first 1000 tokens"
    validation = module.eval_data["sha256"]
    assert len(validation) == 64
    batches = list(module.val_dataloader())
    assert sum(int(batch["label_bytes"].sum()) for batch in batches) == 999
    start = offline_files()["val"][0].read_bytes()[:33]
    assert bytes(batches[0]["input_ids"][0].tolist()) == start[:32]
    assert bytes(batches[0]["labels"][0].tolist()) == start[1:]
    module.setup("test")
    assert module.eval_data["name"].startswith("offline/test")
    assert module.eval_data["sha256"] != validation
    assert len(list(module.test_dataloader())) == 8


def test_val_is_held_out_of_train(make: Any, corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = fitted(make(train=str(corpus), context=8, max_eval_tokens=None))
    assert module.eval_data["name"] == "corpus.txt, last 5%"
    assert str(corpus.parent) not in module.eval_data["name"]
    train, val = (bytes(module._streams[split][0].tokens.tolist()) for split in ("train", "val"))
    assert train + val == corpus.read_bytes()
    assert val.startswith(b"line ")
    assert "train reads" not in caplog.text
    given = fitted(make(train=str(corpus), val=str(corpus)))
    assert given._streams["train"][0].text_bytes == given._streams["val"][0].text_bytes == corpus.stat().st_size


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_is_validated_on_and_trained_on_is_told(
    make: Any, texts: Path, caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")

    def told(**settings: Any) -> bool:
        caplog.clear()
        fitted(make(train=str(texts), context=8, streaming=streaming, **settings))
        return "val: train reads 1 of its files or data sets too" in caplog.text

    assert told(val=str(texts / "..") + "/texts/1.txt")
    other = texts.parent / "other.txt"
    other.write_text("another text")
    assert not told(val=str(other))
    assert not told(val="offline", max_eval_tokens=100)


def test_documents_within_a_file(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    module = fitted(make(val=str(path), document_end="<|endoftext|>"), "validate")
    (batch,) = module.val_dataloader()
    assert batch["label_bytes"].sum() == 6
    assert batch["input_ids"][0, :8].tolist() == [*b"one\n", 256, *b"two"]


@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
def test_the_order_is_that_of_seed_and_epoch_on_any_number_of_workers(make: Any, corpus: Path) -> None:
    def epochs(**settings: Any) -> list[torch.Tensor]:
        loader = fitted(make(train=str(corpus), **settings)).train_dataloader()
        given = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            given.append(torch.cat([batch["input_ids"] for batch in loader]))
        return given

    first, second = epochs()
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    assert not torch.equal(first, epochs(seed=1)[0])
    for workers in (1, 3):
        assert all(map(torch.equal, epochs(workers=workers), (first, second)))


@forks
@pytest.mark.parametrize("workers", [(0, 0, 0), (2, 2, 2), (0, 2, 1), (2, 0, 3)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
def test_a_loader_resumes_in_mid_epoch_on_any_number_of_workers(
    make: Any, corpus: Path, workers: tuple[int, int, int]
) -> None:
    """Stopped twice: after 5 batches, and 4 batches later."""
    first, second, third = (fitted(make(train=str(corpus), workers=number)).train_dataloader() for number in workers)
    first.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert first.state_dict() == {"yielded": 0, "epoch": 3, "ranks": 1}
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    state = first.state_dict()
    rest = [batch["input_ids"] for batch in iterator]
    assert state == {"yielded": 20, "epoch": 3, "ranks": 1} and len(rest) > 10
    assert first.state_dict()["yielded"] == len(first.dataset), "the last batch is smaller"
    second.load_state_dict(state)
    assert second.state_dict() == state
    iterator = iter(second)
    again = [next(iterator)["input_ids"] for _ in range(4)]
    third.load_state_dict(second.state_dict())
    again += [batch["input_ids"] for batch in third]
    assert len(again) == len(rest)
    assert all(map(torch.equal, again, rest))
    third.sampler.set_epoch(4)  # type: ignore[attr-defined]
    assert len(list(third)) == len(first) and third.state_dict()["epoch"] == 4, "the next epoch is whole"


@pytest.mark.parametrize("change", [{"yielded": -1}, {"epoch": "a"}, {"ranks": 0}, {"ranks": None}, {"yielded": 2**70}])
def test_a_place_in_the_text_that_cannot_be_is_refused(make: Any, corpus: Path, change: dict[str, Any]) -> None:
    loader = fitted(make(train=str(corpus))).train_dataloader()
    with pytest.raises(UserError, match="place in the training text is damaged"):
        loader.load_state_dict({"yielded": 4, "epoch": 0, "ranks": 1} | change)


def test_loading_leaves_the_random_state_alone(make: Any, corpus: Path) -> None:
    module = fitted(make(train=str(corpus)))
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(LightningModule):
    """Trains nothing, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.validated = 0

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.append(batch["input_ids"].clone())
        return self.weight * 0

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.validated += int(batch["label_bytes"].sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: TextDataModule, folder: Path, steps: int, **resume: Any) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=module, **resume)
    return recorder


@forks
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_in_the_second_epoch(make: Any, corpus: Path, tmp_path: Path, workers: int) -> None:
    settings = {"train": str(corpus), "context": 64, "batch_size": 8, "workers": workers}
    per_epoch = len(fitted(make(**settings)).train_dataloader())
    assert 10 < per_epoch < 25
    whole = train(make(**settings), tmp_path / "run", 3 * per_epoch)
    assert not torch.equal(whole.seen[0], whole.seen[per_epoch])
    assert whole.validated == 3 * (fitted(make(**settings))._streams["val"][0].text_bytes - 1)
    at = per_epoch // 10 * 10 + 10
    resumed = train(make(**settings), tmp_path / "run", 3 * per_epoch, ckpt_path=tmp_path / "run" / f"step={at}.ckpt")
    assert len(resumed.seen) == 3 * per_epoch - at
    assert all(map(torch.equal, resumed.seen, whole.seen[at:]))


def test_ranks_share_training_and_evaluation(make: Any, corpus: Path) -> None:
    shares = []
    total = blocks = 0
    for rank in range(4):
        module = fitted(make(train=str(corpus), workers=0))
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 4, "rank": rank})
        shares.append(torch.cat([batch["input_ids"] for batch in module.train_dataloader()]))
        windows = list(module.val_dataloader())
        total += sum(int(batch["label_bytes"].sum()) for batch in windows)
        blocks += sum(len(batch["labels"]) for batch in windows)
    assert len({len(share) for share in shares}) == 1
    assert len(torch.cat(shares).unique(dim=0)) == sum(map(len, shares))
    assert total == module._streams["val"][0].text_bytes - 1
    assert blocks % 4 == 0
    module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 999, "rank": 0})
    with pytest.raises(UserError, match="last 5% has .* sequences, too few for 999 processes"):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context: 0 is out of range, the least is 1"),
        ({"stride": 0}, "stride: 0 is out of range"),
        ({"stride": 33}, "stride: 33 is more than the context of 32"),
        ({"batch_size": 0}, "batch_size: 0 is out of range"),
        ({"eval_batch_size": -1}, "eval_batch_size: -1 is out of range"),
        ({"workers": -1}, "workers: -1 is out of range, the least is 0"),
        ({"seed": 2**32}, r"seed: 4294967296 is not below 2\*\*32"),
        ({"max_eval_tokens": 1}, "max_eval_tokens: 1 is out of range, the least is 2"),
        ({"document_end": "a\n"}, "document_end: .* is not the text of one line"),
        ({"tokenizer": "nowhere.json"}, "tokenizer: 'nowhere.json' is neither"),
    ],
)
def test_settings_out_of_range(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_every_setting_is_explained_by_help() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    words = {
        "tokenizer": "path of a Hugging Face tokenizer.json",
        "seed": "Chooses the order",
        "document_end": "such as <|endoftext|>",
    }
    shown = {action.dest.removeprefix("data."): action.help or "" for action in parser._actions}
    for name in signature(TextDataModule).parameters:
        assert words.get(name, "") in shown[name]
        assert len(shown[name]) > 15


def test_texts_that_do_not_do(make: Any, tmp_path: Path, corpus: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * 32)
    single = tmp_path / "single.txt"
    single.write_text("x")
    for settings, stage, message in [
        ({"train": str(short), "val": str(corpus)}, "fit", "train: short.txt has 32 tokens, and one sequence takes 33"),
        ({"train": str(corpus), "val": str(single)}, "fit", r"val: single.txt has no token to predict \(1 tokens"),
        ({"train": str(single)}, "fit", "train: single.txt but the last 5% has 0 tokens"),
        ({"train": str(corpus)}, "test", "test: no text to test on was given"),
        ({"val": str(tmp_path / "corpus")}, "validate", "val: .*did you mean 'corpus.txt'"),
        ({"train": ["offline", str(corpus)]}, "fit", "train: 'offline' is not a file"),
    ]:
        with pytest.raises(UserError, match=message):
            make(**settings).setup(stage)


def test_nothing_is_said_but_a_line_a_text(tmp_path: Path, corpus: Path, bpe: Path) -> None:
    script = (
        "import sys, logging\n"
        "from bimamba_lit.data import TextDataModule\n"
        "assert 'datasets' not in sys.modules\n"
        f"module = TextDataModule({str(corpus)!r}, tokenizer={str(bpe)!r}, context=16, workers=1, "
        f"cache_dir={str(tmp_path / 'cache')!r})\n"
        "module.setup('fit')\n"
        "assert len(list(module.train_dataloader())) and len(list(module.val_dataloader()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = (run.stdout + run.stderr).splitlines()
    assert [line.split(",")[0] for line in lines] == ["train: corpus.txt but the last 5%", "val: corpus.txt"]
    assert "1 document," in lines[0]
