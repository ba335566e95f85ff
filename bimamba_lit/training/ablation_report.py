"""What an ablation's report says beside the comparison: how it was made, every row's settings, and what failed."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from bimamba_lit.report.markdown import escaped, markdown_table
from bimamba_lit.training.grid import Setting, as_argument
from bimamba_lit.training.tuning import Tuning


def command(
    shared: Sequence[str],
    grid: Path,
    seeds: Sequence[int],
    out: Path,
    tuning: Tuning | None,
    jobs: int,
    curves: Sequence[str],
) -> str:
    """Return the command that makes the ablation of the arguments of :func:`bimamba_lit.training.ablation.ablate`."""
    recipe, settings = shared[:2], shared[2:]
    ours = grid.parent == Path(str(files("bimamba_lit") / "grids"))
    parts = ["bimamba", "ablate", *recipe, "--grid", grid.stem if ours else str(grid)]
    parts += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    parts += ["--tune", f"{tuning.key}={','.join(map(as_argument, tuning.values))}"] if tuning else []
    parts += ["--jobs", str(jobs)] if jobs > 1 else []
    parts += ["--curves", *curves] if curves else []
    parts += ["--out", str(out)]
    parts += ["--set", *(setting.removeprefix("--") for setting in settings)] if settings else []
    return shlex.join(parts)


def settings_section(command: str, settings: Mapping[str, Setting], seeds: Sequence[int], jobs: int) -> list[str]:
    """Return the section that says what every row's recipe is.

    Args:
        command: What made the ablation.
        settings: By the name of the row; those of the learning rate that was chosen, where one was tuned.
        seeds: Of every row; none where it is the recipe's.
        jobs: Runs at a time.
    """
    of_seeds = f"the seeds {', '.join(map(str, seeds))}" if seeds else "the recipe's seed"
    shared = f" Training times are of {jobs} runs at a time, which share the machine." if jobs > 1 else ""
    told = (
        f"Every row is the recipe with the settings below and {of_seeds}; a run's `config.yaml` is all of it.{shared}"
    )
    rows = ([escaped(name), " ".join(f"`{text}`" for text in _texts(one))] for name, one in settings.items())
    lines = ["## Settings", "", told, "", "```bash", command, "```", ""]
    return [*lines, *markdown_table(["Row", "Settings"], rows, left=2), ""]


def _texts(setting: Setting) -> list[str]:
    return [f"{key}={as_argument(value)}".replace("|", "\\|") for key, value in setting.items()]


def failed_section(failed: Mapping[str, str]) -> list[str]:
    """Return the section on the runs that did not come to their end, and why, by their names; none without one."""
    if not failed:
        return []
    rows = ([escaped(name), escaped(reason)] for name, reason in failed.items())
    told = "These runs did not come to their end; a row stands without them. The same command runs them again."
    return ["## Failed", "", told, "", *markdown_table(["Run", "Why"], rows, left=2), ""]
