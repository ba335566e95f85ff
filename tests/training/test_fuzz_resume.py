"""Checkpoints changed at random, taken up by training: it goes on, or says one sentence."""

import copy
import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

# A failure is told by its seed; a smaller seed would be no simpler.
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}
SEEDS = st.integers(0, 2**32 - 1)

VALUES = [
    None,
    True,
    0,
    1,
    -1,
    3,
    2**40,
    2**70,
    0.5,
    math.nan,
    math.inf,
    "",
    "a",
    "x" * 999,
    [],
    [1],
    {},
    {"a": 1},
    b"b",
]
SHAPES = [(), (1,), (3, 5), (2, 2, 2), (0,)]


def other(draw: Random) -> Any:
    return copy.copy(draw.choice(VALUES)) if draw.random() < 0.8 else torch.zeros(draw.choice(SHAPES))


def changed(draw: Random, value: Any) -> Any:
    """Change something somewhere inside of a checkpoint."""
    if isinstance(value, dict) and value and draw.random() < 0.92:
        key = draw.choice(list(value))
        match draw.choice(["inside"] * 6 + ["drop", "add", "replace", "swap"]):
            case "drop":
                return {name: item for name, item in value.items() if name != key}
            case "add":
                return value | {draw.choice(["a", "", 0, "step", "lr"]): other(draw)}
            case "replace":
                return value | {key: other(draw)}
            case "swap":
                second = draw.choice(list(value))
                return value | {key: value[second], second: value[key]}
            case _:
                return value | {key: changed(draw, value[key])}
    if isinstance(value, list | tuple) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        kept = value[place + draw.choice([1, 1, 0]) :]
        return type(value)([*value[:place], changed(draw, value[place]), *kept])
    if isinstance(value, torch.Tensor) and value.numel() and draw.random() < 0.8:
        forms = [value.reshape(-1), value.half(), value.to(torch.int8), value.reshape(-1).repeat(2), value.new_zeros(0)]
        return draw.choice(forms)
    return other(draw)


class Run:  # no dataclass: a failure's report would print all that it holds
    def __init__(self, folder: Path, checkpoint: dict[str, Any], args: list[str]) -> None:
        self.folder, self.checkpoint, self.args = folder, checkpoint, args


@pytest.fixture(scope="module")
def run(tiny, bimamba, tmp_path_factory):
    """A student's checkpoint, with every callback's state in it."""
    folder = tmp_path_factory.mktemp("resume")
    watch = "[bimamba_lit.callbacks.BitFlips,bimamba_lit.callbacks.WeightScales,bimamba_lit.callbacks.LossSpikeGuard]"
    args = ["fit", "-c", tiny.distill_recipe, f"--trainer.callbacks={watch}", "--trainer.max_steps=3"]
    answer = bimamba(*args, f"--trainer.default_root_dir={folder / 'first'}")
    assert answer.code == 0, answer
    checkpoint = torch.load(folder / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    return Run(folder, checkpoint, [*args[:-1]])


def goes_on_or_tells(run, bimamba, seed):
    draw = Random(seed)
    mutated = copy.deepcopy(run.checkpoint)
    for _ in range(draw.choice([1, 1, 2])):
        mutated = changed(draw, mutated)
    folder, file = run.folder / "run", run.folder / "changed.ckpt"
    shutil.rmtree(folder, ignore_errors=True)
    torch.save(mutated, file)
    answer = bimamba(*run.args, "--trainer.max_steps=5", f"--trainer.default_root_dir={folder}", "--ckpt_path", file)
    assert answer.code in (0, 1)
    if answer.code:
        said = [line for line in answer.err.splitlines() if line.startswith("bimamba: ")]
        assert len(said) == 1 and "run again with --debug" not in said[0] and len(said[0]) < 2100, (seed, said)
        assert "Traceback" not in answer.err


@settings(**QUIET, max_examples=8, derandomize=True)
@example(seed=109370)  # a beta of AdamW that is 2**70
@example(seed=26335350)  # a callback that names a number where a path should be
@example(seed=679)  # AdamW's amsgrad turned on, without its averages
@given(seed=SEEDS)
def test_training_goes_on_or_one_sentence(run, bimamba, seed):
    goes_on_or_tells(run, bimamba, seed)


@pytest.mark.slow
@settings(**QUIET, max_examples=500)
@given(seed=SEEDS)
def test_training_goes_on_or_one_sentence_at_length(run, bimamba, seed):
    goes_on_or_tells(run, bimamba, seed)
