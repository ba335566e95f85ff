"""The commands. Nothing heavy is imported before a command needs it, so that ``bimamba --help`` answers at once."""

import argparse
import importlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import bimamba_lit
from bimamba_lit.errors import UserError, causes, nearest
from bimamba_lit.interruption import interruption

TRAINING = {
    "fit": "train a teacher or distill a student, as a recipe says",
    "validate": "measure a model on a recipe's validation text; write its summary",
    "test": "measure a model on a recipe's test text",
}
TEACHER_LOGITS = "teacher-logits"
ESTIMATE = "estimate"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, or 1 after one sentence on what went wrong, 2 for a wrong command line.

    ``fit``, ``ablate`` and ``teacher-logits`` exit with 75 (EX_TEMPFAIL) where a signal stopped them and the same
    command goes on.

    Args:
        argv: The command line, without the program's name; ``sys.argv`` by default.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal or a pipe that is not UTF-8 has no "–" of a table
    try:
        if args and args[0] in _RESUMABLE:
            _run_resumable(args)
        else:
            _run(args)
    except KeyboardInterrupt:
        sys.exit("bimamba: interrupted")
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(f"bimamba: {_sentence(error)}")


_RESUMABLE = ("fit", "ablate", TEACHER_LOGITS)


def _run(args: list[str]) -> None:
    try:
        _dispatch(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run_resumable(args: list[str]) -> None:
    with interruption.watched():
        try:
            _dispatch(args)
        except BaseException as error:
            if (stop := interruption.stopped(error)) is None:
                raise
            by = "a signal to another process" if interruption.asked is None else interruption.asked.name
            saved = "" if stop.step is None else f", step {stop.step} is saved"
            print(f"bimamba: interrupted by {by}{saved}; go on with: {_again(args, stop.step)}", file=sys.stderr)
            interruption.end()


def _again(args: list[str], step: int | None) -> str:
    """Return the command that goes on from a checkpoint of this run, or begins again where there is none."""
    if step is not None:
        at = [i for i, arg in enumerate(args) if arg == "--ckpt_path"]
        dropped = {*at, *(i + 1 for i in at)}
        args = [arg for i, arg in enumerate(args) if i not in dropped and not arg.startswith("--ckpt_path=")]
        args = [*args, "--ckpt_path", "last"]
    program = "torchrun ... -m bimamba_lit" if "TORCHELASTIC_RUN_ID" in os.environ else "bimamba"
    return f"{program} {shlex.join(args)}"


def _sentence(error: BaseException) -> str:
    error = next((cause for cause in causes(error) if isinstance(cause, UserError)), error)  # which a library wrapped
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text.rpartition("bimamba_lit.errors.UserError: ")[2]  # from a data worker it comes with a traceback
    if isinstance(error, argparse.ArgumentError):
        return f"{text}; see --help"
    return f"{type(error).__name__}: {text} (run again with --debug for where it came from)"


def _dispatch(args: list[str]) -> None:
    parser = _parser()
    if args and args[0] in TRAINING:
        from bimamba_lit.training.command_line import run

        run(args[0], args[1:])
        return
    if args and args[0] == TEACHER_LOGITS:
        from bimamba_lit.training.teacher_logits import run as store

        store(args[1:])
        return
    if args and args[0] == ESTIMATE and not {"-h", "--help"} & set(args):
        from bimamba_lit.training.estimate import estimate, print_estimate

        print_estimate(estimate(args[1:]))
        return
    known = [*TRAINING, TEACHER_LOGITS, ESTIMATE, *_COMMANDS]
    if args and not args[0].startswith("-") and args[0] not in known:
        raise UserError(f"there is no command '{args[0]}'{nearest(args[0], known) or '; see bimamba --help'}")
    chosen = parser.parse_args(args)
    if chosen.command is None:
        parser.print_help()
        return
    if getattr(chosen, "module", None) is not None:
        _import(chosen.module)
    chosen.run(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bimamba",
        description="Train, compare and ship Mamba language models with 1-bit projections.",
        epilog="Begin with: bimamba recipes. `bimamba COMMAND --help` tells more; --debug shows where errors arose.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bimamba-lit {bimamba_lit.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text)
    commands.add_parser(TEACHER_LOGITS, help="run a recipe's teacher over its text once, for students to train from")
    text = "tell the memory that training a recipe takes on each of its devices"
    usage = "bimamba estimate -c RECIPE.yaml [--key value ...]"
    commands.add_parser(ESTIMATE, help=text, description=text[0].upper() + text[1:] + ".", usage=usage)
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a run folder, a checkpoint, or a saved model's folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)"
    )
    _import_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: %(default)s)")


def _generate(chosen: argparse.Namespace) -> None:
    from bimamba_lit.eval.continue_text import continue_text

    text = continue_text(chosen.ckpt, chosen.prompt, chosen.max_new_tokens, chosen.temperature, chosen.seed)
    print(text)


def _import_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import", dest="module", metavar="MODULE", help="import a module first, one that defines the model's scheme"
    )


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--import: {error}; give a module on PYTHONPATH, by its dotted name") from error


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a run folder, a checkpoint, or a saved model's folder")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files, folders, patterns or hub:OWNER/NAME; each is a line of the table. What is read of a hub data set "
        "is kept under its name: to read one that has changed since, set HF_DATASETS_CACHE to another folder",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: the context)")
    parser.add_argument("--max_tokens", type=int, help="only the first so many tokens of each text")
    parser.add_argument("--column", default="text", help="the column of a table with the text (default: %(default)s)")
    parser.add_argument("--document_end", metavar="LINE", help="a line that ends a document within a file")
    parser.add_argument(
        "--join_lines",
        action="store_true",
        help="for the joined perplexity, join lines instead of documents, as papers do with raw WikiText-2",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="piqa, winogrande, openbookqa, arc_easy, arc_challenge, boolq, hellaswag, or all that have a file",
    )
    parser.add_argument("--task_data", metavar="DIR", help="the folder with a file TASK*.jsonl for each task")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument("--batch_size", type=int, default=8, help="windows or answers at a time (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json, a folder with one, a run, or bytes (default: the model's own)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    _import_argument(parser)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON too")


def _evaluate(chosen: argparse.Namespace) -> None:
    from bimamba_lit.data.source import Source
    from bimamba_lit.eval.evaluate import evaluate, print_evaluation, write_evaluation
    from bimamba_lit.eval.text import TextSettings

    if chosen.out is not None and Path(chosen.out).is_dir():
        raise UserError(f"--out: {chosen.out} is a folder, and the figures are one file: give its name too")
    evaluation = evaluate(
        chosen.ckpt,
        [Source(text, column=chosen.column) for text in chosen.text],
        TextSettings(
            chosen.context, chosen.stride, chosen.max_tokens, chosen.document_end, chosen.join_lines, chosen.batch_size
        ),
        [name for some in chosen.tasks for name in some.split(",") if name],
        None if chosen.task_data is None else Path(chosen.task_data).expanduser(),
        chosen.limit,
        chosen.tokenizer,
        chosen.device,
    )
    print_evaluation(evaluation)
    if chosen.out is not None:
        write_evaluation(evaluation, Path(chosen.out))
        print(f"Written: {chosen.out}")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a run folder, a checkpoint, or a saved model's folder")
    parser.add_argument(
        "--format", required=True, help="torchscript, pt2, safetensors, gguf or transformers; see the README"
    )
    parser.add_argument("--out", required=True, help="the file or the folder to write")
    parser.add_argument("--dtype", help="of what is not binary: float16, bfloat16 or float32")
    parser.add_argument("--embedding", help="of the embedding and the head: int8 or int4 instead of --dtype")
    parser.add_argument("--group_size", type=int, help="entries of such an embedding that share a scale: else a row")
    parser.add_argument("--fallback", help="gguf: f16 for binary layers that Q1_0 cannot hold, refused otherwise")
    _import_argument(parser)


def _export(chosen: argparse.Namespace) -> None:
    from bimamba_lit.export import export

    names = ("dtype", "embedding", "group_size", "fallback")
    options = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    export(chosen.ckpt, chosen.format, chosen.out, options)
    print(f"Written: {chosen.out}")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", required=True, metavar="PATH", help="a run folder, a checkpoint, or any model's folder"
    )
    parser.add_argument("--to", dest="target", required=True, metavar="PATH", help="the folder to write")
    parser.add_argument(
        "--format",
        default="latent",
        help="latent, packed (both this project's), transformers, state-spaces or bi-mamba (default: %(default)s)",
    )
    parser.add_argument("--dtype", help="of the tensors written: float16, bfloat16 or float32")
    _import_argument(parser)


def _convert(chosen: argparse.Namespace) -> None:
    from bimamba_lit.export.convert import convert

    convert(chosen.source, chosen.target, chosen.format, chosen.dtype)
    print(f"Written: {chosen.target}")


def _share_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_DIR", help="the folder of a finished run")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--dtype", help="of what is not binary: float16, bfloat16 or float32")
    parser.add_argument("--embedding", help="of the embedding and the head: int8 or int4 instead of --dtype")
    _import_argument(parser)


def _share(chosen: argparse.Namespace) -> None:
    from bimamba_lit.report.share import share

    options = {name: value for name in ("dtype", "embedding") if (value := getattr(chosen, name)) is not None}
    share(chosen.folder, chosen.out, options)
    print(f"Written: {chosen.out}")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders of finished runs")
    parser.add_argument(
        "--out", default="runs/comparison", help="folder for report.md, .csv, .tex and .png (default: %(default)s)"
    )


def _compare(chosen: argparse.Namespace) -> None:
    from bimamba_lit.report import compare, print_comparison

    comparison = compare([Path(run) for run in chosen.runs], Path(chosen.out))
    print_comparison(comparison)
    _print_written(Path(chosen.out))


def _print_written(out: Path) -> None:
    """Name the files of a report, of which curves.png is there where its runs logged signs or scales."""
    files = [name for name in _REPORT if (out / name).exists()]
    print(f"\nWritten: {out}/{', '.join(files[:-1])} and {files[-1]}")


_REPORT = ("report.md", "report.csv", "report.tex", "report.png", "curves.png")


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", required=True, metavar="RECIPE", help="the recipe that all runs share")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs, over those of the recipe"
    )
    names = ", ".join(sorted(path.stem for path in Path(__file__).with_name("grids").glob("*.yaml")))
    parser.add_argument(
        "--grid",
        required=True,
        metavar="FILE",
        help=f"YAML: recipe keys and the values of each; all combinations run. Or one that comes along: {names}",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=[],
        metavar="0,1,2",
        help="seeds of every setting; its row is their mean and spread (default: the recipe's)",
    )
    parser.add_argument(
        "--tune",
        metavar="KEY=V1,V2,V3",
        help="run each setting at each value with the first seed, and with the other seeds at the best of them",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, spread over the GPUs (default: %(default)s)"
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings whose flips and scales are drawn, by their names in the grid (default: the best)",
    )
    parser.add_argument("--out", help="folder of the runs and the report (default: runs/ablation_GRID)")


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 1 << 32 for part in parts):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not right, it must be whole numbers of 0 to {(1 << 32) - 1}, as in 0,1,2"
        )
    return [int(part) for part in parts]


def _ablate(chosen: argparse.Namespace) -> None:
    from bimamba_lit.training.ablation import ablate
    from bimamba_lit.training.grid import find_grid
    from bimamba_lit.training.tuning import read_tuning

    if chosen.jobs < 1:
        raise UserError(f"--jobs: {chosen.jobs} is out of range, the least is 1")
    grid = find_grid(chosen.grid)
    tuning = None if chosen.tune is None else read_tuning(chosen.tune)
    out = Path(chosen.out or Path("runs") / f"ablation_{grid.stem}")
    shared = ["-c", chosen.config, *(f"--{setting}" for setting in chosen.set)]
    ablate(shared, grid, chosen.seeds, out, tuning, chosen.jobs, chosen.curves)
    _print_written(out)
    if chosen.curves and not (out / "curves.png").exists():
        print(f"--curves: nothing is drawn, as {', '.join(chosen.curves)} logged neither signs nor scales")


def _check_scheme_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scheme", metavar="CLASS", help="the class by its dotted name, such as my_module.MyScheme")


def _check_scheme(chosen: argparse.Namespace) -> None:
    from bimamba_lit.training.check_scheme import check_scheme

    if not check_scheme(chosen.scheme):
        sys.exit(1)


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ls | cp NAME DIR")
    actions.add_parser("ls", help="list the recipes that come with the package (the default)")
    copy = actions.add_parser("cp", help="copy one to a folder, to change it there")
    copy.add_argument("name", help="a recipe's name, with or without .yaml")
    copy.add_argument("dir", help="the folder to copy it to")


def _recipes(chosen: argparse.Namespace) -> None:
    from bimamba_lit.recipe_folder import copy_recipe, list_recipes

    if chosen.action == "cp":
        print(f"Copied to {copy_recipe(chosen.name, Path(chosen.dir))}")
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, first_line in recipes.items():
        print(f"{name:{width}}  {first_line}")
    _warn_of_another_lightning()


def _warn_of_another_lightning() -> None:
    owners = {entry.dist.name for entry in entry_points(group="console_scripts", name="lightning") if entry.dist}
    others = owners - {"bimamba-lit"}
    if others:
        print(
            f"\nThe command `lightning` may be another program here: {', '.join(sorted(others))} installs one too. "
            "`bimamba` and `python -m bimamba_lit` are always this one.",
            file=sys.stderr,
        )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=["all", "accuracy", "cpu", "data", "gpu", "tune"],
        default="all",
        help="(default: all that needs no GPU)",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="text that `bench data` tokenizes (default: the offline corpus)")
    gpu = parser.add_argument_group("bench gpu, bench tune")
    gpu.add_argument("--only", nargs="+", default=[], metavar="OP", help="ops to measure (default: all)")
    gpu.add_argument("--shapes", nargs="+", default=[], metavar="TEXT", help="cases to measure, by a part of the shape")
    gpu.add_argument("--layers", type=int, default=8, help="most blocks of a training step (default: %(default)s)")
    gpu.add_argument("--out", metavar="DIR", help="folder for gpu.md and gpu.csv")
    gpu.add_argument("--kernel", help="the kernel that `bench tune` searches a configuration for, as ssd/chunk_scan")


def _bench(chosen: argparse.Namespace) -> None:
    if chosen.what == "gpu":
        from bimamba_lit.bench.gpu import gpu

        gpu(chosen.only, chosen.out, chosen.layers, chosen.shapes)
        return
    if chosen.what == "tune":
        from bimamba_lit.bench.gpu import tune

        if chosen.kernel is None:
            raise UserError("bench tune needs --kernel, a name in kernels/configurations.py")
        tune(chosen.kernel, chosen.shapes)
        return
    from bimamba_lit.bench.tables import bench

    bench(chosen.what, chosen.threads, chosen.text)


_COMMANDS = {
    "generate": ("continue a text with a trained model", _generate_arguments, _generate),
    "evaluate": ("measure a model on texts and on zero-shot tasks, from local files", _evaluate_arguments, _evaluate),
    "export": ("write a trained model in the form that another program runs", _export_arguments, _export),
    "convert": ("read a model in any form and write it in another", _convert_arguments, _convert),
    "share": ("write a folder to share: the packed model and a card with its figures", _share_arguments, _share),
    "compare": ("lay finished runs side by side: a table and a plot", _compare_arguments, _compare),
    "ablate": ("run a grid of settings and seeds, then lay the runs side by side", _ablate_arguments, _ablate),
    "check-scheme": (
        "check that a binarization scheme trains, packs, is stored and comes back as it should",
        _check_scheme_arguments,
        _check_scheme,
    ),
    "recipes": ("list the recipes, or copy one", _recipes_arguments, _recipes),
    "bench": ("measure accuracy and speed beside the peers", _bench_arguments, _bench),
}
