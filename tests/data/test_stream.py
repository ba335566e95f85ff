"""Weights, documents kept apart, and streaming: every token, no token of another document, exact resume."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bimamba_lit.data import TextDataModule
from bimamba_lit.data.stream import refuse_shuffle_buffer
from bimamba_lit.errors import UserError

CONTEXT = 16


def write(folder: Path, files: int = 6) -> list[str]:
    """Write files of documents, each a letter of its own, many times; return their paths."""
    paths = []
    for number in range(files):
        path = folder / f"{number}.txt"
        letters = [chr(ord("a") + 3 * number + i) for i in range(3)]
        path.write_text("\n<end>\n".join(letter * (20 + 7 * number) for letter in letters))
        paths.append(str(path))
    return paths


def make(folder: Path, trained: bool = True, shares: dict[str, int] | None = None, **settings: Any) -> TextDataModule:
    options: dict[str, Any] = {
        "train": write(folder),
        "val": str(folder / "0.txt"),
        "context": CONTEXT,
        "batch_size": 2,
        "document_end": "<end>",
        "cache_dir": str(folder / "cache"),
        **settings,
    }
    module = TextDataModule(**options)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=100 if trained else -1, distributed_sampler_kwargs=shares
    )
    module.setup("fit")
    return module


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_kept_apart(streaming: bool, tmp_path: Path) -> None:
    module = make(tmp_path, separate_documents=True, streaming=streaming)
    batches = iter(module.train_dataloader())
    seen = 0
    for batch in (next(batches) for _ in range(20)):
        ids, labels, seq_idx = batch["input_ids"], batch["labels"], batch["seq_idx"]
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == ids.shape and (seq_idx[:, 0] == 0).all()
        assert torch.equal(labels[:, :-1][labels[:, :-1] >= 0], ids[:, 1:][labels[:, :-1] >= 0])
        begins = seq_idx[:, 1:] != seq_idx[:, :-1]
        assert torch.equal(begins, ids[:, 1:] == 256)  # a separator is the first of the document after it
        assert torch.equal(labels[:, :-1], ids[:, 1:])  # and what ends the one before it
        for row, numbers in zip(ids, seq_idx, strict=True):
            for number in numbers.unique():
                assert len(set(row[numbers == number].tolist()) - {256, 10}) <= 1
        seen += int(begins.sum())
    assert seen > 10
    window = next(iter(module.val_dataloader()))
    assert window["seq_idx"].shape == window["input_ids"].shape


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_separator_no_document_predicts_the_next(streaming: bool, tmp_path: Path) -> None:
    module = make(tmp_path, separate_documents=True, streaming=streaming)
    tokenizer: Any = module.tokenizer
    tokenizer.separator = None
    module._streams.clear()
    module.cache_dir = str(tmp_path / "other")
    module.setup("fit")
    batches = iter(module.train_dataloader())
    crossed = 0
    for batch in (next(batches) for _ in range(10)):
        begins = batch["seq_idx"][:, 1:] != batch["seq_idx"][:, :-1]
        assert (batch["labels"][:, :-1][begins] == -100).all()
        crossed += int(begins.sum())
    assert crossed > 3


def test_weights_say_how_often_an_epoch_reads_a_source(tmp_path: Path) -> None:
    for name, numbers in (("low", range(100, 160)), ("high", range(500, 560))):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, numbers)))
    sources = [
        {"text": str(tmp_path / "low.txt"), "weight": 0.5},
        {"text": str(tmp_path / "high.txt"), "weight": 2.0},
    ]
    module = make(tmp_path, train=sources)
    loader = module.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append([tuple(row.tolist()) for batch in loader for row in batch["input_ids"]])
    half, twice = (stream.length // CONTEXT for stream in module._streams["train"])
    all_low, all_high = ({tuple(b[:-1]) for b in blocks_of(stream)} for stream in module._streams["train"])
    for epoch in epochs:
        assert abs(len(epoch) - (half // 2 + 2 * twice)) <= 1
        assert sum(row in all_high for row in epoch) >= 2 * twice - 1
    low = [{row for row in epoch if row in all_low} for epoch in epochs]
    assert all(abs(len(rows) - half / 2) <= 1 for rows in low) and not low[0] & low[1]


def blocks_of(stream: Any) -> Any:
    """Yield the blocks of a stream."""
    for start in range(0, stream.length - CONTEXT, CONTEXT):
        yield stream.tokens[start : start + CONTEXT + 1].tolist()


def rows(loader: Any, count: int) -> list[list[int]]:
    iterator = iter(loader)
    return [row for _ in range(count) for row in next(iterator)["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_where_it_stopped(workers: int, tmp_path: Path) -> None:
    whole = rows(make(tmp_path, streaming=True, workers=workers).train_dataloader(), 60)
    loader: Any = make(tmp_path, streaming=True, workers=workers).train_dataloader()
    iterator = iter(loader)
    first = [row for _ in range(23) for row in next(iterator)["input_ids"].tolist()]
    state = loader.state_dict()
    del iterator, loader
    resumed: Any = make(tmp_path, streaming=True, workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    assert first + rows(resumed, 37) == whole


def test_an_epoch_of_a_stream_is_every_token_in_another_order(tmp_path: Path) -> None:
    module = make(tmp_path, streaming=True, batch_size=1)
    (cached,) = make(tmp_path)._streams["train"]
    blocks = rows(module.train_dataloader(), 2 * ((cached.length + 1) // CONTEXT))
    ids = torch.tensor(blocks).flatten()
    once = ids[: cached.length + 1]
    assert torch.equal(once.sort().values[:-1], torch.tensor(cached.tokens.astype(int)).sort().values)
    assert not torch.equal(once[:100], ids[cached.length + 1 : cached.length + 101])


def test_ranks_read_different_files(tmp_path: Path) -> None:
    letters = []
    for rank in range(2):
        module = make(tmp_path, streaming=True, shares={"num_replicas": 2, "rank": rank})
        # Two epochs at most: shards are spread anew in the next.
        letters.append({chr(i) for row in rows(module.train_dataloader(), 4) for i in row} - {"\n", "\u0100"})
    assert not letters[0] & letters[1]


def test_every_process_of_a_stream_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(rank: int) -> Any:
        module = make(tmp_path, streaming=True, batch_size=1, shares={"num_replicas": 2, "rank": rank})
        return module.train_dataloader()

    loaders = [loader(rank) for rank in range(2)]
    read = [iter(one) for one in loaders]
    for iterator in read:
        next(iterator)
    own = [super(type(one), one).state_dict() for one in loaders]
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda states, _: states.__setitem__(slice(None), own))
    state = loaders[0].state_dict()
    for rank, iterator in enumerate(read):
        resumed = loader(rank)
        resumed.load_state_dict(state)
        assert torch.equal(next(iter(resumed))["input_ids"], next(iterator)["input_ids"])
    alone: Any = make(tmp_path, streaming=True).train_dataloader()
    with pytest.raises(UserError, match="from 2 processes, each at a place of its own in the streamed text"):
        alone.load_state_dict(state)
    with pytest.raises(UserError, match="from 3 data workers, .* here are 0: set data.workers to 3"):
        alone.load_state_dict(state | {"workers": 3})


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="streaming: the text never ends, so set trainer.max_steps"):
        make(tmp_path, trained=False, streaming=True)
    with pytest.raises(UserError, match="sources with weights are read from the cache only"):
        make(tmp_path, streaming=True, train=[{"text": str(tmp_path / "0.txt"), "weight": 2}])
    with pytest.raises(UserError, match="val: a part of train is held out only where it is cached"):
        make(tmp_path, streaming=True, val=None)
    module = make(tmp_path, streaming=True, train=str(tmp_path / "0.txt"), shares={"num_replicas": 2, "rank": 0})
    with pytest.raises(UserError, match="has 1 files or shards for 2 readers"):
        next(iter(module.train_dataloader()))


def test_a_shuffle_buffer_is_refused_by_name(tmp_path: Path) -> None:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    rows = Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset(num_shards=3)
    refuse_shuffle_buffer(DataLoader(rows))
    refuse_shuffle_buffer(make(tmp_path, streaming=True).train_dataloader())
    with pytest.raises(UserError, match=r"shuffle\(buffer_size=7\) of `datasets`, whose buffer a resumed"):
        refuse_shuffle_buffer(DataLoader(rows.shuffle(buffer_size=7).map(lambda row: row)))
