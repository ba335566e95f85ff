"""Zero-shot tasks from local files, with lm-eval's own prompts and scoring.

A task is lm-eval's own definition; only where its rows come from is replaced, so nothing is fetched.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bimamba_lit.data.rows import is_json_lines, json_objects
from bimamba_lit.data.sources import file_digest
from bimamba_lit.data.tokenizer import TextTokenizer
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.models import MambaLM

ALL = "all"
_Columns = dict[str, type | tuple[type, ...]]
_LETTERS: _Columns = {"question": str, "choices": dict, "answerKey": str}
COLUMNS: dict[str, _Columns] = {
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": (int, str)},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "openbookqa": {"question_stem": str, "choices": dict, "answerKey": str},
    "arc_easy": _LETTERS,
    "arc_challenge": _LETTERS,
    "boolq": {"passage": str, "question": str, "label": int},
    "hellaswag": {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)},
}
"""The tasks, and of each the columns of a row and what they hold."""
_FOLDERS = {"arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq"}


@dataclass(frozen=True)
class Questions:
    """A task's file and its rows, only the columns that the task needs."""

    path: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskFigures:
    """What a model makes of a task.

    Attributes:
        task: lm-eval's name of it.
        file: The name of the file with its rows.
        sha256: Of that file as it lies on disk.
        questions: Rows that were asked.
        accuracy: Share of them where the right answer has the highest log-likelihood, 0 to 1.
        accuracy_stderr: Its standard error; None of a single question.
        normalized_accuracy: The same where log-likelihoods are divided by the answers' lengths in characters; None for
            tasks that lm-eval does not score so.
    """

    task: str
    file: str
    sha256: str
    questions: int
    accuracy: float
    accuracy_stderr: float | None
    normalized_accuracy: float | None


def find_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Questions]:
    """Return what each task asks.

    Args:
        names: Tasks, or ``all`` for those that have a file.
        folder: Where the files lie, JSON lines, each named after its task, such as ``piqa.val.jsonl.xz``.

    Raises:
        UserError: If lm-eval is not installed, there is no such task or not exactly one file of it, a file cannot be
            read, or a row lacks a column or holds something else in it.
    """
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'bimamba-lit[eval]'")
    for name in names:
        if name not in (ALL, *COLUMNS):
            raise UserError(
                f"--tasks: there is no task '{name}'{nearest(name, COLUMNS) or '; there are ' + ', '.join(COLUMNS)}"
            )
    if folder is None:
        raise UserError("--tasks needs --task_data, the folder with a file of JSON lines for each, named TASK*.jsonl")
    if not folder.is_dir():
        raise UserError(f"--task_data: {folder} is not a folder")
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_json_lines(path))
    found = {name: [path for path in files if path.name.startswith(name)] for name in COLUMNS}
    wanted = [name for name, some in found.items() if some] if ALL in names else list(dict.fromkeys(names))
    if not wanted:
        raise UserError(f"--task_data: {folder} holds no file named after a task ({', '.join(COLUMNS)}) and .jsonl")
    for name in wanted:
        if len(found[name]) != 1:
            several = ", ".join(path.name for path in found[name]) or "none"
            raise UserError(f"--task_data: {folder} must hold one file {name}*.jsonl (or .jsonl.xz), and has {several}")
    return {name: Questions(found[name][0], rows_of(name, found[name][0])) for name in wanted}


def rows_of(name: str, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a task's file, only the columns that it needs.

    Raises:
        UserError: If the file cannot be read, or a row lacks a column or holds something else in it.
    """
    rows = list(_checked(name, path))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _checked(name: str, path: Path) -> Iterator[dict[str, Any]]:
    columns = COLUMNS[name]
    for where, row in json_objects(path):
        if name == "boolq" and isinstance(row.get("answer"), bool):  # BoolQ's own form; SuperGLUE's has the label
            row = {"label": int(row["answer"])} | row
        for column, kind in columns.items():
            if column not in row:
                there = ", ".join(map(repr, row)) or "none"
                raise UserError(f"{where}: {name} needs the column {column!r} (there: {there})")
            if not isinstance(row[column], kind):
                raise UserError(
                    f"{where}: {column!r} holds {type(row[column]).__name__}, which {name} cannot have there"
                )
        _check_choices(name, row, where)
        yield {column: row[column] for column in columns}


def _check_choices(name: str, row: dict[str, Any], where: str) -> None:
    answer: Any
    if "choices" in COLUMNS[name]:
        labels, texts = row["choices"].get("label"), row["choices"].get("text")
        if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)):
            raise UserError(f"{where}: 'choices' needs two lists of one length, 'text' and 'label'")
        answer, answers = row["answerKey"].lstrip(), [str(label) for label in labels]
    elif name == "winogrande":
        answer, answers = row["answer"], ["1", "2"]
        if "_" not in row["sentence"]:
            raise UserError(f"{where}: 'sentence' has no _ where the answer goes")
    else:
        answer = str(row["label"]).strip()
        answers = [str(number) for number in range(len(row["endings"]) if name == "hellaswag" else 2)]
    if answer not in answers:
        raise UserError(f"{where}: the answer {answer!r} is none of {', '.join(answers)}")


def build_task(name: str, rows: list[dict[str, Any]]) -> Any:
    """Return lm-eval's task of that name, asking ``rows``."""
    import lm_eval.tasks
    from datasets import Dataset

    folder = Path(lm_eval.tasks.__file__).parent / _FOLDERS.get(name, name)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    replaced: dict[str, str | None | Callable[..., dict[str, Dataset]]] = {
        "task": name,
        "custom_dataset": lambda **_: {"validation": Dataset.from_list(rows)},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    # A group is how lm-eval takes a task of its own with some settings replaced.
    return manager.load([{"group": "local", "task": [replaced]}])["tasks"][name]


def run_tasks(
    lm: MambaLM, tokenizer: TextTokenizer, tasks: dict[str, Questions], limit: int | None, batch_size: int
) -> list[TaskFigures]:
    """Ask a model the questions of tasks, without examples.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        tasks: What each task asks, as `find_tasks` returns it.
        limit: Only the first so many questions of each; none given, all.
        batch_size: Answers at a time.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from bimamba_lit.eval.lm_eval_adapter import BimambaLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it takes
    results = simple_evaluate(
        model=BimambaLM(lm, tokenizer, batch_size=batch_size),
        tasks=[build_task(name, questions.rows) for name, questions in tasks.items()],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=0,
        limit=limit,
        log_samples=False,
    )
    return [_figures(name, questions, results["results"][name], limit) for name, questions in tasks.items()]


def _figures(name: str, questions: Questions, found: dict[str, Any], limit: int | None) -> TaskFigures:
    normalized = found.get("acc_norm,none")
    return TaskFigures(
        task=name,
        file=questions.path.name,
        sha256=file_digest(questions.path),
        questions=len(questions.rows[:limit]),
        accuracy=float(found["acc,none"]),
        accuracy_stderr=error if isinstance(error := found["acc_stderr,none"], float) else None,
        normalized_accuracy=None if normalized is None else float(normalized),
    )
