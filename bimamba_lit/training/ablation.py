"""Ablations: one recipe run over a grid of settings and seeds into one comparison.

Every run is a process of its own, so that one that fails or runs out of memory takes nothing with it, and every run is
what ``bimamba fit`` with the same settings is. What is finished is not run again; what was interrupted is resumed.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing
from bimamba_lit.interruption import RESUMABLE, Interrupted
from bimamba_lit.report import Comparison, compare, print_comparison
from bimamba_lit.report.markdown import escaped
from bimamba_lit.report.summary import FILE_NAME as SUMMARY
from bimamba_lit.report.summary import read_summary
from bimamba_lit.training.ablation_report import command, failed_section, settings_section
from bimamba_lit.training.gpus import Gpus, visible_gpus
from bimamba_lit.training.grid import Run, plan, read_grid
from bimamba_lit.training.recipe_read import read_settings
from bimamba_lit.training.tuning import Tuning, read_trials, trials

PROGRAM = (sys.executable, "-m", "bimamba_lit")
RECORD = "ablation.yaml"
LOG = "log.txt"
_REASON_LINES = 20  # of a failed run's log, in which its last sentence is looked for


def ablate(
    shared: Sequence[str],
    grid: Path,
    seeds: Sequence[int],
    out: Path,
    tuning: Tuning | None = None,
    jobs: int = 1,
    curves: Sequence[str] = (),
) -> Comparison:
    """Run every setting of a grid with every seed and lay the finished runs side by side in ``out``.

    Args:
        shared: The arguments of ``bimamba fit`` that all runs share: ``-c RECIPE`` and settings.
        grid: The file of settings.
        seeds: The seeds; none takes the recipe's own.
        out: The folder of the runs' folders and of the report.
        tuning: A key to tune first: every setting runs at every value with the first seed, and then with the other
            seeds at the value that came to the least bits per byte.
        jobs: Runs at a time, which share the processor's cores and are spread over the GPUs.
        curves: The settings whose flips and scales are drawn, by their names in the grid; none draws the best.

    Raises:
        UserError: If the recipe or the grid cannot be read, a setting to draw is not in it, ``out`` holds the ablation
            of another recipe, it is stopped, or no run came to its end.
    """
    base = read_settings(shared)
    settings = read_grid(grid)
    plan(settings, seeds)
    for name in curves:
        if name not in settings:
            raise UserError(f"--curves: {grid} has no setting {name}{nearest(name, settings)}")
    _claim(out, base)
    runner = Runner(shared, out, jobs)
    drawn = {name: settings[name] for name in curves}
    tried = None
    failed: dict[str, str] = {}
    if tuning is not None:
        failed |= runner.run(trials(tuning, settings, seeds))
        tried = read_trials(tuning, settings, seeds, out)
        settings, drawn = tried.chosen(settings), tried.chosen(drawn)
    runs = plan(settings, seeds)
    if rest := [run for run in runs if run.name not in failed]:
        failed |= runner.run(rest)
    finished = [out / run.name for run in runs if run.name not in failed]
    if not finished:
        raise UserError(f"no run of {grid} came to its end; the first failed so: {next(iter(failed.values()))}")
    made_with = command(shared, grid, seeds, out, tuning, jobs, curves)
    teachers, apart = _teachers(finished)
    no_row = [
        f"the teacher {teacher} was measured on another text, context or stride than the runs" for teacher in apart
    ]
    sections = [*(tried.section() if tried else []), *settings_section(made_with, settings, seeds, jobs)]
    sections += [line for sentence in no_row for line in (f"Without a row: {escaped(sentence)}.", "")]
    folders = [out / run.name for run in plan(drawn, seeds)]
    comparison = compare([*finished, *teachers], out, [*sections, *failed_section(failed)], folders)
    runner.console.rule(align="left")
    print_comparison(comparison, runner.console)
    for sentence in no_row:
        runner.console.print(f"without a row: {sentence}", highlight=False)
    for warning in tried.warnings() if tried else []:
        runner.console.print(f"at the edge: {warning}", highlight=False)
    for name, reason in failed.items():
        runner.console.print(f"failed: {name}: {reason}; see {out / name / LOG}", highlight=False)
    return comparison


def _claim(out: Path, base: dict[str, Any]) -> None:
    """Make ``out`` the folder of this recipe's ablation, or raise if runs of another's have begun there."""
    record = out / RECORD
    if record.is_file() and any(out.glob("*/config.yaml")):
        if yaml.safe_load(record.read_text(encoding="utf-8")) != base:
            raise UserError(f"{out} holds an ablation of another recipe: choose another --out")
        return
    with replacing(record) as temporary:
        temporary.write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")


def _teachers(runs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the run folders of the runs' teachers: those that were evaluated as the runs were, and the others."""
    found: dict[Path, bool] = {}
    for run in runs:
        summary = read_summary(run)
        if summary.teacher is None or not (Path(summary.teacher) / SUMMARY).is_file():
            continue
        teacher = read_summary(summary.teacher)
        of_both = ((one.eval_data["sha256"], one.context, one.stride) for one in (summary, teacher))
        found[Path(summary.teacher)] = len(set(of_both)) == 1
    return [path for path, alike in found.items() if alike], [path for path, alike in found.items() if not alike]


class Runner:
    """Runs runs, some at a time, each on the GPU that the fewest use, and shows what they print."""

    def __init__(self, shared: Sequence[str], out: Path, jobs: int) -> None:
        self.shared, self.out, self.jobs = shared, out, jobs
        self.console = Console()
        self._gpus = Gpus(visible_gpus())
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopping = False
        self._done = 0

    def run(self, runs: Sequence[Run]) -> dict[str, str]:
        """Run what is not finished yet, and return why runs failed, by name."""
        waiting = {run.name: run for run in runs if not (self.out / run.name / SUMMARY).is_file()}
        self._tell(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already")
        failed: dict[str, str] = {}
        self._done = 0
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {pool.submit(self._told, run, len(waiting)): run.name for run in waiting.values()}
                for future in as_completed(futures):
                    if (reason := future.result()) is not None:
                        failed[futures[future]] = reason
            except Interrupted:
                self._stop(pool)
                raise
        return failed

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        """Start no run any more and let those that run save what they have."""
        pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.terminate()

    def _told(self, run: Run, number: int) -> str | None:
        """Run one of a number of runs, say so once it is done, and return why it failed, or None."""
        try:
            reason = self._one(run)
        except OSError as error:
            reason = f"cannot start it or keep its log in {self.out / run.name}: {error.strerror or error}"
        with self._lock:
            self._done += 1
            done = self._done
        self._tell(f"{done} of {number} done: {run.name}" + (f" failed: {reason}" if reason else ""))
        return reason

    def _one(self, run: Run) -> str | None:
        """Run one, show and keep what it prints, and return why it failed, or None."""
        folder = self.out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        self._tell(run.name)
        arguments = run.arguments(self.shared, folder)
        trainer = read_settings(arguments).get("trainer") or {}
        with (
            (folder / LOG).open("a", encoding="utf-8") as log,
            self._gpus.lent(trainer) as environment,
            self._started([*PROGRAM, *arguments], environment) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                with self._lock:
                    print(line if self.jobs == 1 else f"{run.name}: {line}", end="", flush=True)
        with self._lock:
            self._processes.discard(process)
        if process.returncode == 0:
            return None
        if process.returncode == RESUMABLE:
            raise Interrupted
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()[-_REASON_LINES:]
        said = [line.removeprefix("bimamba: ") for line in lines if line.startswith("bimamba: ")]
        return said[-1] if said else f"exit code {process.returncode}"

    def _started(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        threads = {} if self.jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        with self._lock:
            if self._stopping:
                raise Interrupted
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
                env=threads | os.environ | environment,
                process_group=0,  # Ctrl-C reaches this process alone, which has the runs save what they have
            )
            self._processes.add(process)
        return process

    def _tell(self, text: str) -> None:
        with self._lock:
            self.console.rule(f"[bold]{text}", align="left")
