"""A run killed at random moments ends as one that never was: weights, optimizer, callbacks, logs."""

import csv
import io
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

KINDS: dict[str, dict[str, Any]] = {
    "workers, accumulation, validation between": {"data__init_args__workers": 2},
    "streamed": {"data__init_args__streaming": True, "trainer__accumulate_grad_batches": 1},
    "by epochs": {
        "trainer__max_steps": -1,
        "trainer__max_epochs": 4,
        "trainer__val_check_interval": 1.0,
        "trainer__check_val_every_n_epoch": 1,
        "checkpoint": {},
    },
}
SOFT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Undisturbed(NamedTuple):
    args: list[str]
    folder: Path
    whole: Path


@pytest.fixture(scope="module")
def undisturbed(zygote: Any, recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the command of a kind of run, its folder, and where an undisturbed one lies."""
    there: dict[str, Undisturbed] = {}

    def run(kind: str) -> Undisturbed:
        if kind not in there:
            folder = tmp_path_factory.mktemp("kind") / "run"
            args = ["fit", "-c", str(recipe(folder, **KINDS[kind])), "--ckpt_path", "last"]
            one = zygote.start(*args)
            assert one.wait() == 0, one.said()
            there[kind] = Undisturbed(args, folder, folder.rename(folder.parent / "whole"))
        return there[kind]

    return run


def kill(zygote: Any, one: Undisturbed, draw: random.Random) -> str:
    """Start or resume a run, kill it at a moment drawn, and tell when that was."""
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, *SOFT])
    moment = draw.choice(["begins", "trains", "trains", "writes"])
    if moment == "writes":
        fault = {"first": draw.randrange(1, 4), "call": draw.randrange(1, 80), "number": int(number)}
        run = zygote.start(*one.args, fault=fault)
        told = f"{number.name} in write {fault['call']} of checkpoint {fault['first']}"
    else:
        run = zygote.start(*one.args)
        delay = draw.uniform(0.05, 2.0) if moment == "begins" else draw.uniform(0.0, 0.2)
        told = f"{number.name} {delay:.3f} s after it {moment}"
        if moment == "trains":
            row = draw.randrange(23)
            told += f" step {row}"
            run.until(lambda: any(int(found["step"]) >= row for found in rows(one.folder)))
        time.sleep(delay)
        run.send(number)
    code = run.wait()
    finished = (one.folder / "summary.json").exists()  # before the signal, or as it came
    assert finished or code == (-number if number == signal.SIGKILL else 75), f"{told}: exit code {code}; {run.said()}"
    return told


def rows(folder: Path) -> list[dict[str, str]]:
    file = folder / "metrics.csv"
    if not file.exists():
        return []
    whole = file.read_text().rpartition("\n")[0]
    # The newest row may be read while it is being written anew.
    return [row for row in csv.DictReader(io.StringIO(whole)) if (row["step"] or "").isdecimal()]


def kill_and_resume(zygote: Any, compare: Any, one: Undisturbed, kills: int, seed: int) -> list[str]:
    """Kill a run at moments drawn from a seed, resume it to its end, and return how it differs from ``one.whole``."""
    draw, told = random.Random(seed), []
    for _ in range(kills):
        told.append(kill(zygote, one, draw))
        if (one.folder / "summary.json").exists():
            break
    else:
        last = zygote.start(*one.args)
        assert last.wait() == 0, last.said()
    found = compare(one.folder, one.whole)
    shutil.rmtree(one.folder)
    return [f"seed {seed}: {', '.join(told)}", *found] if found else []


def test_a_run_killed_three_times_ends_as_if_it_had_not_been(zygote: Any, compare: Any, undisturbed: Any) -> None:
    one = undisturbed("workers, accumulation, validation between")
    found = kill_and_resume(zygote, compare, one, kills=3, seed=0)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_twenty_killed_runs_end_as_if_they_had_not_been(zygote: Any, compare: Any, undisturbed: Any) -> None:
    kinds, failed = list(KINDS), []
    for seed in range(1, 21):
        kind = kinds[seed % len(kinds)]
        found = kill_and_resume(zygote, compare, undisturbed(kind), kills=1 + seed % 3, seed=seed)
        failed += ["\n".join([kind, *found[:20]])] if found else []
    print(f"{20 - len(failed)} of 20 identical")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_signal_in_any_batch_changes_nothing(zygote: Any, compare: Any, undisturbed: Any, kind: str) -> None:
    one, failed = undisturbed(kind), []
    for batch in (0, 3, 4, 13, 14):
        first = zygote.start(*one.args, env={"SIGNAL_IN_BATCH": str(batch)})
        assert first.wait() == 75, first.said()
        last = zygote.start(*one.args)
        assert last.wait() == 0, last.said()
        found = compare(one.folder, one.whole)
        shutil.rmtree(one.folder)
        failed += [f"in batch {batch}: {found[-5:]}"] if found else []
    assert not failed, "\n".join(failed)
