"""A BPE trained on the training text: every text comes back, the same text gives the same one, once."""

from pathlib import Path
from typing import Any

import pytest

from bimamba_lit.data import TextDataModule, bpe
from bimamba_lit.data.bpe import bpe_size, trained_bpe
from bimamba_lit.data.sources import Span
from bimamba_lit.data.tokenizer import SubwordTokenizer
from bimamba_lit.errors import UserError

ODD = "naïve 漢字 🎉\r\n\t  <|endoftext|> end"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the hat sat on the cat\n" * 50, encoding="utf-8")
    return path


def test_every_text_comes_back_and_bytes_add_up(corpus: Path, tmp_path: Path) -> None:
    tokenizer = SubwordTokenizer(trained_bpe([Span(corpus)], None, 300, tmp_path))
    assert tokenizer.vocab_size <= 300 and tokenizer.separator is not None
    ids, sizes = tokenizer.encode_sizes([ODD])
    assert tokenizer.decode(ids[0].tolist()) == ODD
    assert sizes[0].sum() == len(ODD.encode())
    assert tokenizer.separator not in ids[0]
    assert len(tokenizer.encode("the cat sat on the mat")) < 10
    assert tokenizer.splits_at_words()


def test_it_is_trained_once_and_the_same_everywhere(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    first = trained_bpe([Span(corpus)], None, 300, tmp_path / "one")
    assert "training a BPE of 300 tokens" in capsys.readouterr().out
    assert trained_bpe([Span(corpus)], None, 300, tmp_path / "one") == first
    assert not capsys.readouterr().out
    moved = corpus.rename(tmp_path / "elsewhere.txt")
    assert trained_bpe([Span(moved)], None, 300, tmp_path / "one") == first
    assert not capsys.readouterr().out
    assert trained_bpe([Span(moved)], None, 300, tmp_path / "two") == first
    smaller = SubwordTokenizer(trained_bpe([Span(moved)], None, 262, tmp_path / "two"))
    assert smaller.vocab_size == 262


def test_it_is_trained_on_the_beginning_of_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat sat " * 300, "on a mat, so " * 300, "zzzzzz " * 600]
    parts = [Span(tmp_path / f"{number}.txt") for number in range(3)]
    for part, text in zip(parts, texts, strict=True):
        part.path.write_text(text)
    monkeypatch.setattr(bpe, "_LARGEST_TEXT", len(texts[0]) + 1)
    found = trained_bpe(parts, None, 280, tmp_path / "all")
    assert found == trained_bpe(parts[:2], None, 280, tmp_path / "two")
    assert found != trained_bpe(parts[:1], None, 280, tmp_path / "one")


def test_the_data_module_trains_it_on_the_training_text_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("zzzzzz " * 100)
    settings: dict[str, Any] = {"train": str(corpus), "context": 8, "batch_size": 2, "cache_dir": str(tmp_path / "c")}
    module = TextDataModule(tokenizer="bpe:270", val=str(tmp_path / "val.txt"), **settings)
    assert module.vocab_size == module.tokenizer.vocab_size <= 270
    assert len(module.tokenizer.encode("zzzz")) == 4
    module.setup("fit")
    assert next(iter(module.train_dataloader()))["input_ids"].max() < module.vocab_size


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:257", "bpe:-1", "bpe:8k"])
def test_sizes_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="write bpe:8192"):
        bpe_size(name)
    assert bpe_size("bytes") is None


def test_one_that_is_in_the_cache_needs_no_right_to_write(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [Span(corpus)]
    made = trained_bpe(parts, None, 300, tmp_path / "cache")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert trained_bpe(parts, None, 300, tmp_path / "cache") == made
    with pytest.raises(UserError, match="cannot write the token cache .*Permission denied; set HF_DATASETS_CACHE"):
        trained_bpe(parts, None, 301, tmp_path / "cache")
