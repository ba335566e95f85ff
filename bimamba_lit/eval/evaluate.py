"""``bimamba evaluate``: a saved model on texts and on zero-shot tasks, as a table and a JSON file."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bimamba_lit
from bimamba_lit.data.source import Source
from bimamba_lit.errors import UserError
from bimamba_lit.eval.reader import load_reader
from bimamba_lit.eval.text import TextFigures, TextSettings, measure_text
from bimamba_lit.eval.zeroshot import TaskFigures, find_tasks, run_tasks
from bimamba_lit.files import write_json
from bimamba_lit.models.count import count_parameters, true_bits


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of texts and tasks.

    Attributes:
        model: The path it was read from.
        params: Its weights, scales included.
        binarized_params: Those of them in binary layers, or in layers of a few bits.
        true_bits: Bits it takes to store it.
        text: Figures of each text.
        tasks: Figures of each task.
        mean_accuracy: Mean accuracy of the tasks; None without one.
        limit: Of how many questions of each task; None for all.
        version: The version of this package.
    """

    model: str
    params: int
    binarized_params: int
    true_bits: int
    text: list[TextFigures]
    tasks: list[TaskFigures]
    mean_accuracy: float | None
    limit: int | None
    version: str = bimamba_lit.__version__


def evaluate(
    path: str | Path,
    texts: Sequence[Source],
    settings: TextSettings,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measure a saved model, packed or not.

    Args:
        path: A run folder, a checkpoint, a folder that ``MambaLM.from_pretrained`` takes, or ``hub:OWNER/NAME``.
        texts: Texts for bits per byte and perplexity.
        settings: How they are read; its batch size is that of the tasks too.
        tasks: Zero-shot tasks by name, or ``all`` that have a file.
        task_data: The folder with the tasks' files.
        limit: Only the first so many questions of each task.
        tokenizer: The tokenizer to use instead of the one saved with the model, as `load_tokenizer` takes it.
        device: Where to compute; a GPU by default if there is one.

    Raises:
        UserError: If there is nothing to evaluate, or the model, its tokenizer, a text or a task's file is missing or
            cannot be used.
    """
    if not texts and not tasks:
        raise UserError("there is nothing to evaluate on: give --text, --tasks or both")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} is out of range, the least is 1")
    # What is wrong with the last text or task is told before the first is measured.
    questions = find_tasks(tasks, task_data) if tasks else {}
    for source in texts:
        source.parts("--text", streaming=True)
    lm, reader = load_reader(path, tokenizer)
    try:
        lm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    of_texts = [measure_text(lm, reader, source, settings) for source in texts]
    of_tasks = run_tasks(lm, reader, questions, limit, settings.batch_size) if questions else []
    params, binarized = count_parameters(lm)
    return Evaluation(
        model=str(path),
        params=params,
        binarized_params=binarized,
        true_bits=true_bits(lm),
        text=of_texts,
        tasks=of_tasks,
        mean_accuracy=sum(task.accuracy for task in of_tasks) / len(of_tasks) if of_tasks else None,
        limit=limit,
    )


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write an evaluation as JSON, all of it or nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    write_json(out, asdict(evaluation))


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print an evaluation as tables."""
    console = console or Console()
    console.print(
        f"{evaluation.model}: {evaluation.params:,} weights, {evaluation.binarized_params:,} of them binarized, "
        f"{evaluation.true_bits / 8 / 2**20:.3g} MiB true size",
        highlight=False,
        soft_wrap=True,
    )
    if evaluation.text:
        rows = (
            (
                text.name,
                f"{text.bytes:,}",
                f"{text.context}" + (f" by {text.stride}" if text.stride != text.context else ""),
                f"{text.bits_per_byte:.3f}",
                _short(text.perplexity),
                _short(text.joined_perplexity),
            )
            for text in evaluation.text
        )
        console.print(_table(["text", "bytes", "context", "bits/byte", "perplexity", "joined"], rows))
    if evaluation.tasks:
        lines = [
            (
                task.task,
                f"{task.questions:,}",
                f"{task.accuracy:.1%}" + ("" if task.accuracy_stderr is None else f" ± {task.accuracy_stderr:.1%}"),
                "–" if task.normalized_accuracy is None else f"{task.normalized_accuracy:.1%}",
            )
            for task in evaluation.tasks
        ]
        mean = [("mean", "", f"{evaluation.mean_accuracy:.1%}", "")] if len(lines) > 1 else []
        console.print(_table(["task", "questions", "accuracy", "by length"], [*lines, *mean]))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.2e}"
