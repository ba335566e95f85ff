"""Bits per byte and perplexity of a text under a model."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bimamba_lit.data.blocks import EvalWindows, SeparateWindows
from bimamba_lit.data.joined import Joined
from bimamba_lit.data.source import Source
from bimamba_lit.data.tokenizer import TextTokenizer
from bimamba_lit.data.tokens import default_cache, token_stream
from bimamba_lit.errors import UserError
from bimamba_lit.eval.metrics import LanguageMetrics
from bimamba_lit.models import MambaLM


@dataclass(frozen=True)
class TextSettings:
    """How a text is read.

    Args:
        context: Tokens of a window.
        stride: Tokens from one window to the next, for bits per byte; the context if none is given.
        max_tokens: Only the text's first so many tokens; none given, all.
        document_end: A line that ends a document within a file and is not part of it.
        join_lines: For the papers' perplexity, join the text's lines instead of its documents; see `Joined`.
        batch_size: Windows at a time.

    Raises:
        UserError: If a number is out of range.
    """

    context: int = 2048
    stride: int | None = None
    max_tokens: int | None = None
    document_end: str | None = None
    join_lines: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("stride", 1), ("max_tokens", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name}: {value} is out of range, the least is {least}")
        if self.stride is not None and self.stride > self.context:
            raise UserError(
                f"--stride: {self.stride} is more than the context of {self.context}, so tokens would be skipped"
            )


@dataclass(frozen=True)
class TextFigures:
    """What a model makes of a text.

    Attributes:
        name: The text's name.
        sha256: Of its UTF-8 bytes, the documents in order.
        documents: Its documents.
        bytes: Its UTF-8 bytes.
        tokens: Its tokens.
        context: Tokens of a window.
        stride: Tokens from one window to the next, for the two figures that follow.
        bits_per_byte: Over every token but each document's first, as ``bimamba validate`` and ``test`` have it.
        perplexity: A token, over the same tokens.
        joined_perplexity: As quantization papers give it: the text as one document, windows that do not overlap and
            are predicted from themselves alone.
        windows: Windows of the joined text.
    """

    name: str
    sha256: str
    documents: int
    bytes: int
    tokens: int
    context: int
    stride: int
    bits_per_byte: float
    perplexity: float
    joined_perplexity: float
    windows: int


def measure_text(lm: MambaLM, tokenizer: TextTokenizer, source: Source, settings: TextSettings) -> TextFigures:
    """Measure a model on a text.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        source: The text.
        settings: How it is read.

    Raises:
        UserError: If the text is missing, empty, not UTF-8, or shorter than a window.
    """
    parts = source.parts("--text", streaming=True)
    limit, context, stride = settings.max_tokens, settings.context, settings.stride or settings.context
    streams = [
        token_stream(
            group,
            tokenizer,
            default_cache(),
            document_end=settings.document_end,
            sized=True,
            max_tokens=limit,
            title=source.name,
        )
        for group in (parts, [Joined(tuple(parts), settings.join_lines)])
    ]
    text, joined = streams
    windows = SeparateWindows(joined, context)
    if not len(windows):
        raise UserError(
            f"--text: {source.name} has {joined.text_tokens} tokens, and a window takes {context}: give a longer text "
            "or a smaller --context"
        )
    exact = EvalWindows(text, context, stride)
    if not exact.targets:
        raise UserError(f"--text: all documents of {source.name} are single tokens, so there is nothing to predict")
    figures = measure(lm, exact, settings.batch_size)
    return TextFigures(
        name=source.name,
        sha256=text.sha256,
        documents=text.documents,
        bytes=text.text_bytes,
        tokens=text.text_tokens,
        context=context,
        stride=stride,
        bits_per_byte=figures["bits_per_byte"],
        perplexity=figures["perplexity"],
        joined_perplexity=measure(lm, windows, settings.batch_size)["perplexity"],
        windows=len(windows),
    )


@torch.no_grad()
def measure(lm: MambaLM, windows: Dataset[dict[str, Tensor]], batch_size: int) -> dict[str, float]:
    """Return the figures of `LanguageMetrics` over windows.

    Args:
        lm: The model.
        windows: Items with ``input_ids``, ``labels`` and ``label_bytes``, as `EvalWindows` has them.
        batch_size: Windows at a time.
    """
    from datasets.utils import tqdm

    metrics = LanguageMetrics().to(lm.device)
    head = lm.head_weight
    with tqdm(total=len(cast(Sized, windows)), unit="window", desc="evaluating", disable=None, delay=1) as bar:
        for batch in DataLoader(windows, batch_size=batch_size):
            ids, labels, sizes = (batch[key].to(lm.device) for key in ("input_ids", "labels", "label_bytes"))
            metrics.update(lm.backbone(ids), head, labels, sizes)
            bar.update(len(ids))
    return {name: float(value) for name, value in metrics.compute().items()}
