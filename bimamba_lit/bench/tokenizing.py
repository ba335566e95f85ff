"""Time and peak memory of turning a text into packed sequences, beside the ``datasets`` map a user would write.

Each is run in a process of its own, from an empty cache, and stops once the sequences lie on disk: here
``TextDataModule.setup``, there ``load_dataset("text")``, a map that tokenizes and a map that joins and cuts, both
batched as in the examples of transformers.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bimamba_lit.data import TextDataModule, offline_corpus
from bimamba_lit.data.bpe import trained_bpe
from bimamba_lit.data.source import part_of
from bimamba_lit.data.tokenizer import ByteTokenizer, load_tokenizer
from bimamba_lit.errors import UserError

CONTEXT = 1024
_TIMES = 14  # the offline corpus so often is about 100 MB
_BPE_TOKENS = 8192


def tokenizing(text: str | None = None) -> Iterator[tuple[str, float, float]]:
    """Yield rows of a name, seconds and peak memory in MB, of the process and its children together.

    Args:
        text: A text file; none given, the offline corpus many times over.

    Raises:
        UserError: If the file does not exist.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        if text is None:
            path.write_text("".join(offline_corpus().train) * _TIMES, encoding="utf-8")
        elif not (path := Path(text)).is_file():
            raise UserError(f"--text: there is no file {text}")
        size = f"{path.stat().st_size / 1e6:.0f} MB"
        bpe = Path(folder) / "tokenizer.json"
        bpe.write_text(trained_bpe([part_of(path, "text")], None, _BPE_TOKENS, Path(folder)), encoding="utf-8")
        for title, tokenizer in (("bytes", "bytes"), (f"BPE of {_BPE_TOKENS}", str(bpe))):
            yield f"bimamba-lit, {title}, {size}", *_measured(_ours, path, tokenizer)
            yield f"datasets map, {title}, {size}", *_measured(_map, path, tokenizer)


def _measured(run: Callable[[Path, str], None], path: Path, tokenizer: str) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_report, args=(run, path, tokenizer, answers))
    process.start()
    answer: tuple[float, float] = answers.get()
    process.join()
    return answer


def _report(run: Callable[[Path, str], None], path: Path, tokenizer: str, answers: Any) -> None:
    import resource  # not on Windows

    import datasets

    datasets.disable_progress_bars()
    start = time.perf_counter()
    run(path, tokenizer)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    answers.put((seconds, peak / (1e6 if sys.platform == "darwin" else 1e3)))


def _ours(path: Path, tokenizer: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        module = TextDataModule(
            train=str(path), val=str(path), tokenizer=tokenizer, context=CONTEXT, max_eval_tokens=2, cache_dir=cache
        )
        module._prepare_train()


def _map(path: Path, tokenizer: str) -> None:
    from datasets import load_dataset

    encoder = load_tokenizer(tokenizer)
    encode: Callable[[list[str]], list[Any]]
    if isinstance(encoder, ByteTokenizer):
        encode = lambda texts: [list(text.encode()) for text in texts]  # noqa: E731
    else:
        from tokenizers import Tokenizer

        plain = Tokenizer.from_file(tokenizer)
        encode = lambda texts: [encoding.ids for encoding in plain.encode_batch(texts)]  # noqa: E731

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(rows["input_ids"]))
        whole = len(ids) // CONTEXT * CONTEXT
        blocks = [ids[i : i + CONTEXT] for i in range(0, whole, CONTEXT)]
        return {"input_ids": blocks, "labels": [block.copy() for block in blocks]}

    with tempfile.TemporaryDirectory() as cache:
        lines = load_dataset("text", data_files=str(path), split="train", keep_linebreaks=True, cache_dir=cache)
        tokens = lines.map(lambda rows: {"input_ids": encode(rows["text"])}, batched=True, remove_columns=["text"])
        tokens.map(group, batched=True)
