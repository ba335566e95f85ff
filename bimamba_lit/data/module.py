"""The Lightning data module: text in, batches of packed sequences out."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from bimamba_lit.data.blocks import EpochOrder, EvalWindows, TrainBlocks
from bimamba_lit.data.offline import offline_files
from bimamba_lit.data.sources import HELD_OUT, Span, find_files, hold_out
from bimamba_lit.data.tokenizer import load_tokenizer
from bimamba_lit.data.tokens import TokenStream, token_stream
from bimamba_lit.errors import UserError

Text = str | list[str]


class TextDataModule(LightningDataModule):
    """Text as packed sequences for training and as exact evaluation windows.

    A text is ``offline`` (the source of Python's standard library, about 7 MB, with files held out for val and test),
    or local UTF-8 text files: paths of files (plain or .xz, .gz, .bz2), of folders (their .txt files) or glob
    patterns, one or a list. Each file is one document, taken byte for byte. Nothing is ever fetched from a network.

    Training batches hold ``input_ids`` (B, L) and ``labels`` (B, L), the next token of each position, int64. All
    documents are joined by the tokenizer's separator and cut in blocks, every token being predicted once an epoch; a
    last partial block is dropped. The order depends on seed and epoch alone, not on the number of workers.

    Evaluation batches also hold ``label_bytes`` (B, L) int64, the UTF-8 bytes of each counted label. Every text token
    except a document's first is counted exactly once; separators are not; labels that are not counted are -100.

    ``vocab_size`` and ``tokenizer`` are known at once. ``eval_data`` holds ``name`` and ``sha256`` of the evaluation
    text (the UTF-8 bytes of its documents in order, after max_eval_tokens): val's after ``setup("fit")`` and
    ``setup("validate")``, test's after ``setup("test")``.

    Args:
        train: Text to train on.
        val: Text to validate on; none given, the last 5 percent of train's bytes, from the next line on (offline: its
            own val files).
        test: Text to test on; none given, there is a test only if train is offline.
        tokenizer: ``bytes``, or the path of a Hugging Face tokenizer.json.
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
        cache_dir: Folder for tokenized text; none given, a folder bimamba_lit in the cache of Hugging Face datasets.

    Raises:
        UserError: If a number is out of range or the tokenizer cannot be read; in ``setup``, if a text is missing,
            empty, not UTF-8, or too short.
    """

    def __init__(
        self,
        train: str | list[str] = "offline",
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        tokenizer: str = "bytes",
        context: int = 256,
        stride: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        max_eval_tokens: int | None = None,
        document_end: str | None = None,
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
        self.texts: dict[str, Text | None] = {"train": train, "val": val, "test": test}
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.context = context
        self.stride = stride or context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.workers = workers
        self.seed = seed
        self.max_eval_tokens = max_eval_tokens
        self.document_end = document_end
        self.cache_dir = cache_dir
        self.eval_data: dict[str, str] = {}
        self._streams: dict[str, TokenStream] = {}

    def setup(self, stage: str) -> None:
        """Tokenize what a stage needs, unless the cache has it; processes that want the same text wait for the first.

        Args:
            stage: ``fit``, ``validate`` or ``test``.

        Raises:
            UserError: If a text is missing, empty, not UTF-8, or too short.
        """
        if stage == "fit":
            self._prepare("train")
        if stage in ("fit", "validate"):
            self._prepare("val")
        if stage == "test":
            self._prepare("test")

    def train_dataloader(self) -> StatefulDataLoader:
        """Return the training batches; the loader's state is its position, and resumes exactly."""
        blocks = TrainBlocks(self._streams["train"], self.context)
        order = EpochOrder(blocks, self.seed, *self._ranks())
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
            return StatefulDataLoader(blocks, batch_size=self.batch_size, sampler=order, **self._loading())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the windows of the validation text, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the windows of the test text, in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        ranks, rank = self._ranks()
        windows = EvalWindows(self._streams[split], self.context, self.stride, multiple_of=ranks)
        share: DistributedSampler[Any] | None = None
        if ranks > 1:
            share = DistributedSampler(windows, ranks, rank, shuffle=False)
        return DataLoader(windows, batch_size=self.eval_batch_size, sampler=share, **self._loading())

    def _ranks(self) -> tuple[int, int]:
        """Return over how many processes the strategy spreads the data, and which of them this is."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (shares["num_replicas"], shares["rank"]) if shares else (1, 0)

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A loader draws a seed whenever it is iterated: from its own generator, so that the model's random state
            # does not depend on how often validation runs.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _prepare(self, split: str) -> None:
        evaluates = split != "train"
        name, spans = self._spans(split)
        limit = self.max_eval_tokens if evaluates else None
        stream = token_stream(
            spans,
            self.tokenizer,
            self._cache(),
            document_end=self.document_end,
            sized=evaluates,
            max_tokens=limit,
            title=name,
        )
        if evaluates:
            count = EvalWindows(stream, self.context, self.stride).targets
            if not count:
                raise UserError(
                    f"{split}: {name} has no token to predict ({stream.text_tokens} tokens in all): give a longer text"
                )
            cut = f", first {limit} tokens" if limit is not None and stream.text_tokens == limit else ""
            self.eval_data = {"name": name + cut, "sha256": stream.sha256}
        elif not len(TrainBlocks(stream, self.context)):
            raise UserError(
                f"train: {name} has {stream.text_tokens} tokens, and one sequence takes {self.context + 1}: "
                "give a longer text or a smaller context"
            )
        self._streams[split] = stream
        documents = f"{stream.documents:,} document" + "s" * (stream.documents != 1)
        rank_zero_info(f"{split}: {name}, {documents}, {stream.text_bytes / 1e6:.1f} MB, {stream.text_tokens:,} tokens")

    def _spans(self, split: str) -> tuple[str, list[Span]]:
        """Return what a split's text is called, and where it is."""
        text, train = self.texts[split], self.texts["train"]
        if text == "offline" or (text is None and train == "offline"):
            return f"offline/{split}", [Span(path) for path in offline_files()[split]]
        if text is not None and (split != "train" or self.texts["val"] is not None):
            return _name(text), [Span(path) for path in find_files(text, split)]
        if split == "test" or train is None:
            raise UserError("test: no text to test on was given; accepted: 'offline', or paths of local text files")
        kept, held = hold_out(find_files(train, "train"))
        share = f"{HELD_OUT:.0%}"
        return (
            (f"{_name(train)} but the last {share}", kept)
            if split == "train"
            else (f"{_name(train)}, last {share}", held)
        )

    def _cache(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        from datasets import config

        return Path(config.HF_DATASETS_CACHE) / "bimamba_lit"


def _name(text: Text) -> str:
    """Return the last parts of paths: a summary of a run says nothing about the machine's folders."""
    return " + ".join(Path(part).name for part in ([text] if isinstance(text, str) else text))


def _at_least(least: int, **settings: int | None) -> None:
    for key, value in settings.items():
        if value is not None and value < least:
            raise UserError(f"{key}: {value} is out of range, the least is {least}")
