"""Checkpoints changed at random, taken up by training: it goes on, or says one sentence."""

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

values = st.sampled_from(
    [None, True, 0, 1, -1, 3, 2**40, 2**70, 0.5, math.nan, math.inf, "", "a", "x" * 999, [], [1], {}, {"a": 1}, b"b"]
) | st.sampled_from([(), (1,), (3, 5), (2, 2, 2), (0,)]).map(torch.zeros)


def changed(data: st.DataObject, value: Any) -> Any:
    """Change something somewhere inside of a checkpoint."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 11)):
        key = data.draw(st.sampled_from(list(value)))
        rest = {name: item for name, item in value.items() if name != key}
        match data.draw(st.sampled_from(["inside"] * 6 + ["drop", "add", "replace", "swap"])):
            case "drop":
                return rest
            case "add":
                return value | {data.draw(st.sampled_from(["a", "", 0, "step", "lr"])): data.draw(values)}
            case "replace":
                return value | {key: data.draw(values)}
            case "swap":
                other = data.draw(st.sampled_from(list(value)))
                return value | {key: value[other], other: value[key]}
            case _:
                return value | {key: changed(data, value[key])}
    if isinstance(value, list | tuple) and value and data.draw(st.integers(0, 9)):
        place = data.draw(st.integers(0, len(value) - 1))
        kept = value[place + data.draw(st.sampled_from([1, 1, 0])) :]
        return type(value)([*value[:place], changed(data, value[place]), *kept])
    if isinstance(value, torch.Tensor) and value.numel():
        kinds = ["reshape", "half", "integers", "longer", "nothing", "value"]
        match data.draw(st.sampled_from(kinds)):
            case "reshape":
                return value.reshape(-1)
            case "half":
                return value.half()
            case "integers":
                return value.to(torch.int8)
            case "longer":
                return torch.cat([value.reshape(-1), value.reshape(-1)])
            case "nothing":
                return value.new_zeros(0)
    return data.draw(values)


@pytest.fixture(scope="module")
def checkpoint(tiny, bimamba, tmp_path_factory):
    """A student's checkpoint, with every callback's state in it."""
    folder = tmp_path_factory.mktemp("resume")
    watch = "[bimamba_lit.callbacks.BitFlips,bimamba_lit.callbacks.WeightScales,bimamba_lit.callbacks.LossSpikeGuard]"
    args = ["fit", "-c", tiny.distill_recipe, f"--trainer.callbacks={watch}", "--trainer.max_steps=3"]
    answer = bimamba(*args, f"--trainer.default_root_dir={folder / 'first'}")
    assert answer.code == 0, answer
    return folder, torch.load(folder / "first" / "checkpoints" / "last.ckpt", weights_only=True), [*args[:-1]]


def goes_on_or_tells(checkpoint, bimamba, data, times):
    folder, whole, args = checkpoint
    mutated = copy.deepcopy(whole)
    for _ in range(times):
        mutated = changed(data, mutated)
    run, file = folder / "run", folder / "changed.ckpt"
    shutil.rmtree(run, ignore_errors=True)
    torch.save(mutated, file)
    answer = bimamba(*args, "--trainer.max_steps=5", f"--trainer.default_root_dir={run}", "--ckpt_path", file)
    assert answer.code in (0, 1)
    if answer.code:
        said = [line for line in answer.err.splitlines() if line.startswith("bimamba: ")]
        assert len(said) == 1 and "run again with --debug" not in said[0] and len(said[0]) < 2000, said
        assert "Traceback" not in answer.err


@settings(**QUIET, max_examples=8, derandomize=True)
@given(data=st.data())
def test_training_goes_on_or_one_sentence(checkpoint, bimamba, data):
    goes_on_or_tells(checkpoint, bimamba, data, 1)


@pytest.mark.slow
@settings(**QUIET, max_examples=500)
@given(data=st.data())
def test_training_goes_on_or_one_sentence_at_length(checkpoint, bimamba, data):
    goes_on_or_tells(checkpoint, bimamba, data, data.draw(st.integers(1, 2)))
