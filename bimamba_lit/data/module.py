"""The Lightning data module: text in, batches of packed sequences out."""

import copy
import hashlib
import json
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from bimamba_lit.data.blocks import BlockLoader, EpochOrder, EvalWindows, TrainBlocks
from bimamba_lit.data.bpe import bpe_size, trained_bpe
from bimamba_lit.data.offline import offline_files
from bimamba_lit.data.source import Setting, as_sources, parts_of, text_of, without_held_out
from bimamba_lit.data.sources import HELD_OUT, Part, Span
from bimamba_lit.data.stream import StreamBlocks, StreamLoader
from bimamba_lit.data.tokenizer import ByteTokenizer, SubwordTokenizer, load_tokenizer
from bimamba_lit.data.tokens import TokenStream, default_cache, token_stream
from bimamba_lit.data.worker_signals import ShieldedLoader, hold_signals_back
from bimamba_lit.errors import UserError


class TextDataModule(LightningDataModule):
    """Text as packed sequences for training and as exact evaluation windows.

    A text is ``offline`` (the source of Python's standard library, about 7 MB, with files held out for val and test);
    local files: paths of files (plain or .xz, .gz, .bz2), of folders or glob patterns, one or a list; or
    ``hub:OWNER/NAME``, a data set of the Hugging Face hub. A text file is one document, taken byte for byte; JSON
    lines (.jsonl, .ndjson, .json) and Parquet (.parquet) give a document a row. A mapping instead of a name also sets
    weight, column, subset and split, as `Source` has them. Nothing is fetched from a network unless a setting names
    the hub.

    Training batches hold ``input_ids`` (B, L) and ``labels`` (B, L), the next token of each position, int64, and unless
    streamed ``sequence`` (B,), the numbers of the sequences in the text, int64. All documents are joined by the
    tokenizer's separator and cut in blocks, every token being predicted once an epoch; a last partial block is dropped.
    The order depends on seed and epoch alone, not on the number of workers. With ``separate_documents`` batches also
    hold ``seq_idx`` (B, L) int32, the number of the document that a token is of (a separator is the first token of the
    document after it), and models start afresh at each.

    Evaluation batches also hold ``label_bytes`` (B, L) int64, the UTF-8 bytes of each counted label. Every text token
    except a document's first is counted exactly once; separators are not; labels that are not counted are -100.

    ``vocab_size`` and ``tokenizer`` are known at once. ``eval_data`` holds ``name`` and ``sha256`` of the evaluation
    text (the UTF-8 bytes of its documents in order, after max_eval_tokens): val's after ``setup("fit")`` and
    ``setup("validate")``, test's after ``setup("test")``.

    Args:
        train: Text to train on. Sources whose weight is not 1 are read that often in an epoch; what two sources of one
            weight name is read once.
        val: Text to validate on; none given, the last 5 percent of train's bytes, from the next line on (offline: its
            own val files).
        test: Text to test on; none given, there is a test only if train is offline.
        tokenizer: ``bytes``; ``bpe:8192``, a byte-level BPE of so many tokens trained on the training text (its first
            100 million characters) and kept; the path of a Hugging Face tokenizer.json, of a folder with one or of a
            run, whose tokenizer it is; or ``hub:OWNER/NAME``, a model's on the hub.
        context: Tokens in a sequence.
        stride: Tokens by which evaluation windows advance; each later window counts its last stride tokens. The same as
            context if none is given; smaller is slower and gives every token more to look back on.
        batch_size: Sequences in a training batch, on each device.
        eval_batch_size: Sequences in an evaluation batch; the same as batch_size if none is given.
        workers: Processes that load batches; 0 loads in the main process.
        seed: Chooses the order of training sequences.
        max_eval_tokens: Cut the evaluation text after this many tokens, to keep validation short; none given, all of
            it is used.
        document_end: A line that ends a document inside a file and is not part of it, such as <|endoftext|>.
        separate_documents: Keep documents apart inside a sequence.
        streaming: Tokenize the training text as it is read, with nothing on disk. Files (of hub data sets, their
            shards) are shuffled, not what is in them: a shuffle buffer could not be resumed exactly. There must be at
            least as many as workers, over all processes; the run needs ``trainer.max_steps``, since the text never
            ends.
        cache_dir: Folder for tokenized text and trained tokenizers; none given, a folder bimamba_lit in the cache of
            Hugging Face datasets. A hub data set to evaluate on is kept there under its name: to read one that has
            changed since, give another folder.

    Raises:
        UserError: If a number is out of range or the tokenizer cannot be read; in ``setup``, if a text is missing,
            empty, not UTF-8, or too short.
    """

    def __init__(
        self,
        train: Setting = "offline",
        val: Setting | None = None,
        test: Setting | None = None,
        tokenizer: str = "bytes",
        context: int = 256,
        stride: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        max_eval_tokens: int | None = None,
        document_end: str | None = None,
        separate_documents: bool = False,
        streaming: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _at_least(1, context=context, stride=stride, batch_size=batch_size, eval_batch_size=eval_batch_size)
        _at_least(0, workers=workers, seed=seed)
        _at_least(2, max_eval_tokens=max_eval_tokens)
        if stride is not None and stride > context:
            raise UserError(f"stride: {stride} is more than the context of {context}, so tokens would be skipped")
        if seed >= 1 << 32:
            raise UserError(f"seed: {seed} is not below 2**32")
        if document_end is not None and (not document_end or "\n" in document_end):
            raise UserError(f"document_end: {document_end!r} is not the text of one line")
        self.texts: dict[str, Setting | None] = {"train": train, "val": val, "test": test}
        self.context = context
        self.stride = stride or context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.workers = workers
        self.seed = seed
        self.max_eval_tokens = max_eval_tokens
        self.document_end = document_end
        self.separate_documents = separate_documents
        self.streaming = streaming
        self.cache_dir = cache_dir
        self.tokenizer = self._tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.eval_data: dict[str, str] = {}
        self._streams: dict[str, list[TokenStream]] = {}
        self._weights: list[float] = []
        self._shards: list[Part] = []
        self._trained_on: set[Hashable] = set()

    def setup(self, stage: str) -> None:
        """Tokenize what a stage needs, unless the cache has it; processes that want the same text wait for the first.

        Args:
            stage: ``fit``, ``validate`` or ``test``.

        Raises:
            UserError: If a text is missing, empty, not UTF-8, or too short.
        """
        if stage == "fit" and self.streaming:
            self._prepare_stream()
        elif stage == "fit":
            self._prepare_train()
        if stage in ("fit", "validate"):
            self._prepare_evaluation("val")
        if stage == "fit":
            self._tell_what_is_in_both()
        if stage == "test":
            self._prepare_evaluation("test")

    def testing_on(self, text: Setting) -> "TextDataModule":
        """Return the same module with another text to test on."""
        other = copy.copy(self)
        other.texts = self.texts | {"test": text}
        other.eval_data, other._streams = {}, {}
        return other

    def train_blocks(self) -> TrainBlocks:
        """Return the training sequences by number, as they were cut after ``setup("fit")``.

        Raises:
            UserError: If the text is streamed, where sequences have no numbers.
        """
        if self.streaming:
            raise UserError("data.streaming: a streamed text has no numbered sequences: set it to false")
        return TrainBlocks(
            self._streams["train"], self.context, self._weights, self.separate_documents, self.tokenizer.separator
        )

    def training_data(self) -> dict[str, Any]:
        """Return what decides every numbered training sequence, as plain values.

        Raises:
            UserError: If the text is streamed.
        """
        texts = [[stream.sha256, stream.documents, stream.length] for stream in self.train_blocks().streams]
        told = [texts, self.document_end, self.tokenizer.to_json()]
        return {
            "context": self.context,
            "separate_documents": self.separate_documents,
            "text and tokenizer (SHA-256)": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        }

    def train_dataloader(self) -> StatefulDataLoader:
        """Return the training batches; the loader's state is its position, and resumes exactly."""
        blocks: Any
        if self.streaming:
            blocks = StreamBlocks(
                self._shards,
                self.tokenizer,
                self.context,
                self.seed,
                self.document_end,
                self.separate_documents,
                *self._ranks(),
            )
            order = None
        else:
            blocks = self.train_blocks()
            order = EpochOrder(blocks, self.seed, *self._ranks())
            if not len(order):
                raise UserError(
                    f"train: {self._training_text()[0]} has {len(blocks)} sequences, too few for {order.num_replicas} "
                    "processes: give a longer text, a smaller context or fewer devices"
                )
            # Workers begin to fetch before Lightning tells a run resumed at the start of an epoch which it is.
            order.set_epoch(getattr(self.trainer, "current_epoch", 0))
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
            loader = StreamLoader if self.streaming else BlockLoader
            return loader(blocks, batch_size=self.batch_size, sampler=order, **self._loading())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the windows of the validation text, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the windows of the test text, in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        ranks, rank = self._ranks()
        (stream,) = self._streams[split]
        windows = EvalWindows(stream, self.context, self.stride, ranks, self.separate_documents)
        share: DistributedSampler[Any] | None = None
        if ranks > 1:
            share = DistributedSampler(windows, ranks, rank, shuffle=False)
        return ShieldedLoader(windows, batch_size=self.eval_batch_size, sampler=share, **self._loading())

    def _ranks(self) -> tuple[int, int]:
        """Return over how many processes the strategy spreads the data, and which of them this is."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (shares["num_replicas"], shares["rank"]) if shares else (1, 0)

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": hold_signals_back,
            # A loader draws a seed whenever it is iterated: from its own generator, so that the model's random state
            # does not depend on how often validation runs.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _prepare_train(self) -> None:
        name, groups = self._training_text()
        self._trained_on = {text_of(part) for _, parts in groups for part in parts}
        streams = [self._stream(name, parts) for _, parts in groups]
        self._weights = [weight for weight, _ in groups]
        if not len(TrainBlocks(streams, self.context, self._weights)):
            raise UserError(
                f"train: {name} has {sum(stream.text_tokens for stream in streams)} tokens, and one sequence takes "
                f"{self.context + 1}: give a longer text or a smaller context"
            )
        self._streams["train"] = streams
        _tell("train", name, streams)

    def _prepare_stream(self) -> None:
        if self.trainer is not None and self.trainer.max_steps < 1:
            raise UserError("streaming: the text never ends, so set trainer.max_steps")
        interval = getattr(self.trainer, "val_check_interval", None)
        if isinstance(interval, float) and interval != 1.0:
            raise UserError(f"streaming: the text never ends, so trainer.val_check_interval must not be {interval}")
        name, groups = self._training_text()
        if any(weight != 1 for weight, _ in groups):
            raise UserError("streaming: sources with weights are read from the cache only: set streaming to false")
        self._shards = [part for _, parts in groups for part in parts]
        self._trained_on = set(map(text_of, self._shards))
        rank_zero_info(f"train: {name}, {len(self._shards):,} files or shards, streamed")

    def _prepare_evaluation(self, split: str) -> None:
        name, parts = self._evaluation_text(split)
        limit = self.max_eval_tokens
        stream = self._stream(name, parts, sized=True, max_tokens=limit)
        if not EvalWindows(stream, self.context, self.stride).targets:
            raise UserError(
                f"{split}: {name} has no token to predict ({stream.text_tokens} tokens in all): give a longer text"
            )
        cut = f", first {limit} tokens" if limit is not None and stream.text_tokens == limit else ""
        self.eval_data = {"name": name + cut, "sha256": stream.sha256}
        self._streams[split] = [stream]
        _tell(split, name, [stream])

    def _tell_what_is_in_both(self) -> None:
        if self.texts["val"] is None:  # the rest of a file is no text of train
            return
        if both := self._trained_on & set(map(text_of, self._evaluation_text("val")[1])):
            rank_zero_info(
                f"val: train reads {len(both)} of its files or data sets too, so its figures are of text that was "
                "trained on: leave them out of one of the two"
            )

    def _stream(self, title: str, parts: list[Part], sized: bool = False, max_tokens: int | None = None) -> TokenStream:
        return token_stream(
            parts,
            self.tokenizer,
            self._cache(),
            document_end=self.document_end,
            sized=sized,
            max_tokens=max_tokens,
            title=title,
        )

    def _tokenizer(self, name: str) -> ByteTokenizer | SubwordTokenizer:
        if (size := bpe_size(name)) is None:
            return load_tokenizer(name)
        parts = [part for _, group in self._training_text()[1] for part in group]
        return SubwordTokenizer(trained_bpe(parts, self.document_end, size, self._cache()))

    def _training_text(self) -> tuple[str, list[tuple[float, list[Part]]]]:
        """Return what the training text is called, and its parts by how often an epoch reads them."""
        train = self.texts["train"]
        assert train is not None
        if train == "offline":
            return "offline/train", [(1.0, [Span(path) for path in offline_files()["train"]])]
        sources = as_sources(train, "train")
        name = " + ".join(source.name for source in sources)
        groups: dict[float, list[Part]] = {}
        for weight in dict.fromkeys(source.weight for source in sources):
            alike = [source for source in sources if source.weight == weight]
            groups[weight] = parts_of(alike, "train", self.streaming, in_shards=self.streaming)
        if self.texts["val"] is not None:
            return name, list(groups.items())
        if len(groups) > 1 or self.streaming:
            raise UserError("val: a part of train is held out only where it is cached and has no weights: set val")
        ((weight, parts),) = groups.items()
        return f"{name} but the last {HELD_OUT:.0%}", [(weight, without_held_out(parts)[0])]

    def _evaluation_text(self, split: str) -> tuple[str, list[Part]]:
        text, train = self.texts[split], self.texts["train"]
        if text == "offline" or (text is None and train == "offline"):
            return f"offline/{split}", [Span(path) for path in offline_files()[split]]
        if text is None and split == "test":
            raise UserError("test: no text to test on was given; accepted: 'offline', or paths of local text files")
        held_out = text is None
        chosen = train if text is None else text
        assert chosen is not None
        sources = as_sources(chosen, "train" if held_out else split)
        name = " + ".join(source.name for source in sources)
        if held_out:
            return f"{name}, last {HELD_OUT:.0%}", without_held_out(parts_of(sources, "train"))[1]
        return name, parts_of(sources, split, streaming=True)

    def _cache(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return default_cache()


def _tell(split: str, name: str, streams: list[TokenStream]) -> None:
    documents, size, tokens = (
        sum(getattr(stream, field) for stream in streams) for field in ("documents", "text_bytes", "text_tokens")
    )
    plural = "s" * (documents != 1)
    rank_zero_info(f"{split}: {name}, {documents:,} document{plural}, {size / 1e6:.1f} MB, {tokens:,} tokens")


def _at_least(least: int, **settings: int | None) -> None:
    for key, value in settings.items():
        if value is not None and value < least:
            raise UserError(f"{key}: {value} is out of range, the least is {least}")
