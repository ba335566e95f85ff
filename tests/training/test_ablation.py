import errno
import json
import math
import os
import signal
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.interruption import Interrupted, interruption
from bimamba_lit.report import Summary, write_summary
from bimamba_lit.training import ablation
from bimamba_lit.training.ablation_report import command
from bimamba_lit.training.gpus import VISIBLE, Gpus
from bimamba_lit.training.grid import Run, find_grid, plan, read_grid
from bimamba_lit.training.tuning import Trials, Tuning, read_tuning


def grid(folder: Path, content: object) -> Path:
    path = folder / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_mapping_is_all_combinations_and_a_list_each_of_its_blocks(tmp_path):
    found = read_grid(grid(tmp_path, {"a": [1, 2], "b": "x"}))
    assert found == {"a-1-b-x": {"a": 1, "b": "x"}, "a-2-b-x": {"a": 2, "b": "x"}}
    blocks = [{"a": 1}, {"b": [[1, 2], [3]]}]
    assert list(read_grid(grid(tmp_path, blocks)).values()) == [{"a": 1}, {"b": [1, 2]}, {"b": [3]}]


def test_a_block_may_have_a_name_and_its_runs_say_what_differs_in_it(tmp_path):
    blocks = [{"name": "row scale", "b": "x"}, {"name": "both", "a": [1, 2], "b": "y"}]
    assert read_grid(grid(tmp_path, blocks)) == {
        "row_scale": {"b": "x"}, "both-a-1": {"a": 1, "b": "y"}, "both-a-2": {"a": 2, "b": "y"},
    }  # fmt: skip


def test_settings_of_one_name_are_numbered_past_the_names_that_are_taken(tmp_path):
    blocks = [{"name": name, "a": value} for value, name in enumerate(["x", "x", "x-3", "x", "x", "xy"])]
    named = read_grid(grid(tmp_path, blocks))
    assert {name: setting["a"] for name, setting in named.items()} == {
        "x": 0, "x-2": 1, "x-3": 2, "x-4": 3, "x-5": 4, "xy": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1", "is not YAML"),
        ("a: 2026-13-01", "is not YAML"),
        pytest.param("a: " + "[" * 2000, "is not YAML", id="deep"),
        ("just text", "is no grid"),
        ("", "is no grid"),
        ({1: [2]}, "is no grid"),
        ([], "is empty"),
        ({"a": []}, "a has no value"),
        ([{"a": 1}, {"name": "other", "a": 1}], "the setting other twice"),
    ],
)
def test_what_is_no_grid_is_told(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_grid(grid(tmp_path, content))
    with pytest.raises(UserError, match="cannot read the grid"):
        read_grid(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="there is no grid scheme; did you mean 'schemes'"):
        find_grid("scheme")


def test_every_run_has_a_name_of_its_own_and_all_its_settings(tmp_path):
    settings = [
        {
            "model.binarizer": "bimamba_lit.binarize.FBI",
            "model.binarizer.pattern": "row",
            "model.targets": [["in_proj"]],
        },
        {"model.binarizer": "other.FBI", "model.binarizer.pattern": "row", "model.targets": [["in_proj"]]},
    ]
    runs = plan(read_grid(grid(tmp_path, settings)), [0, 1])
    name = "binarizer-FBI-pattern-row-targets-in_proj"
    assert [run.name for run in runs] == [f"{name}-seed0", f"{name}-seed1", f"{name}-2-seed0", f"{name}-2-seed1"]
    (tmp_path / "checkpoints").mkdir()
    assert runs[1].arguments(["-c", "r.yaml", "--trainer.max_steps=5"], tmp_path) == [
        "fit", "-c", "r.yaml", "--trainer.max_steps=5", "--model.binarizer=bimamba_lit.binarize.FBI",
        "--model.binarizer.pattern=row", "--model.targets=[in_proj]", "--seed_everything=1", "--data.seed=1",
        f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last",
    ]  # fmt: skip
    assert plan({"a-1": {"a": 1}}, []) == [Run("a-1", {"a": 1}, None)]
    content = {"model.double_inputs": [{"out_proj": [1, 0]}, {}]}
    assert list(read_grid(grid(tmp_path, content))) == ["double_inputs-out_proj_1_0", "double_inputs-none"]
    with pytest.raises(UserError, match="a seed twice"):
        plan({"a-1": {"a": 1}}, [0, 0])


def test_a_grid_runs_to_one_report_and_is_not_run_again(tiny, bimamba, tmp_path, monkeypatch):
    content = {"model.binarizer": ["bimamba_lit.binarize.FBI", "bimamba_lit.binarize.Sing"]}
    out = tmp_path / "out"
    args = ["ablate", "-c", tiny.distill_recipe, "--grid", grid(tmp_path, content), "--seeds=3", "--out", out]
    args += ["--set", "model.temperature=2.0", "trainer.max_steps=2"]
    answer = bimamba(*args)
    assert answer.code == 0, answer
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "ablation.yaml", "report.md", "report.csv", "report.tex", "report.png",
    }  # fmt: skip
    report = (out / "report.md").read_text()
    assert "| binarizer-FBI-seed3 | FBI |" in report.replace("\\", "")
    assert json.loads((out / "binarizer-FBI-seed3" / "summary.json").read_text())["seed"] == 3
    config = yaml.safe_load((out / "binarizer-FBI-seed3" / "config.yaml").read_text())
    assert config["data"]["init_args"]["seed"] == 3 and config["trainer"]["max_steps"] == 2
    assert "failed: binarizer-Sing-seed3" in answer.out and "did you mean" in answer.out
    assert "teacher |" in report and "without a row" not in answer.out
    assert "checkpoint" not in (out / "binarizer-FBI-seed3" / "log.txt").read_text()  # of which a new run has none

    ran = []
    monkeypatch.setattr(ablation.Runner, "_one", lambda self, run: ran.append(run.name) or "not run")
    answer = bimamba(*args)
    assert answer.code == 0 and "1 of them finished already" in answer.out
    assert ran == ["binarizer-Sing-seed3"]

    args[2] = tiny.teacher_recipe
    answer = bimamba(*args)
    assert answer.code == 1 and "holds an ablation of another recipe" in answer.err
    (out / "binarizer-FBI-seed3" / "config.yaml").unlink()
    answer = bimamba(*args)  # no run has begun, as after a misspelt setting: the folder is free
    assert "another recipe" not in answer.err


def test_when_nothing_comes_to_its_end_it_is_an_error(tiny, bimamba, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation.Runner, "_one", lambda *args: "out of memory")
    answer = bimamba("ablate", "-c", tiny.teacher_recipe, "--grid", grid(tmp_path, {"a": 1}), "--out", tmp_path / "out")
    assert answer.code == 1 and "no run of" in answer.err and "out of memory" in answer.err


def test_seeds_that_are_no_numbers_are_told(tiny, bimamba, tmp_path):
    args = ["ablate", "-c", tiny.distill_recipe, "--grid", grid(tmp_path, {"a": [1]}), "--out", tmp_path / "out"]
    for seeds in ("0,one", "-1", "0,99999999999"):
        answer = bimamba(*args, f"--seeds={seeds}")
        told = f"argument --seeds: '{seeds}' is not right, it must be whole numbers of 0 to 4294967295, as in 0,1,2"
        assert answer.code == 2 and told in answer.err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_fails_a_run_and_not_the_ablation(tmp_path, monkeypatch, capsys):
    def one(self, run):
        if run.name.endswith("0"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ablation.Runner, "_one", one)
    failed = ablation.Runner([], tmp_path, jobs=1).run(plan({"a": {}}, [0, 1]))
    assert list(failed) == ["a-seed0"] and failed["a-seed0"].endswith("No space left on device")
    told = capsys.readouterr().out
    assert told.index("1 of 2 done: a-seed0 failed") < told.index("2 of 2 done: a-seed1")


def test_a_run_is_told_done_before_the_next_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation.Runner, "_one", lambda self, run: self._tell(f"begun: {run.name}"))
    ablation.Runner([], tmp_path, jobs=1).run(plan({"a": {}}, range(20)))
    told = [line.rstrip(" ─") for line in capsys.readouterr().out.splitlines()[1:]]
    assert told == [text for i in range(20) for text in (f"begun: a-seed{i}", f"{i + 1} of 20 done: a-seed{i}")]


@pytest.mark.parametrize(
    ("text", "values"),
    [("lr=1e-3,2e-3", (0.001, 0.002)), ("k=1,2,3", (1, 2, 3)), ("m.s=tanh,bireal", ("tanh", "bireal"))],
)
def test_what_is_tuned_is_read_as_yaml_is(text, values):
    assert read_tuning(text) == Tuning(text.split("=")[0], values)


@pytest.mark.parametrize("text", ["lr", "lr=", "lr=1", "=1,2", "lr=1,1", "lr=[1,{", "lr=2026-13-01,1"])
def test_what_is_no_tuning_is_told(text):
    with pytest.raises(UserError, match="--tune"):
        read_tuning(text)


def summary(**values: object) -> Summary:
    text = {"name": "text", "sha256": "0" * 64}
    of_all = dict(perplexity=4.0, eval_data=text, context=8, stride=8, params=9, binarized_params=8, true_bits=64)
    return Summary(**of_all, tokens_seen=99, seconds=1.0, teacher=None, version="1", **values)


def test_every_setting_is_tuned_with_the_first_seed_and_runs_on_at_its_best(tiny, bimamba, tmp_path, monkeypatch):
    """The best rate differs by scheme, one rate of one scheme fails, and all of another's do."""
    ran = []

    def fake(self, run):
        ran.append(run.name)
        scheme, rate = run.setting["scheme"], run.setting["lr"]
        if (scheme, rate) == ("a", 0.002) or scheme == "c":
            return "diverged"
        best = {"a": 0.004, "b": 0.002}[scheme]
        result = summary(name=run.name, scheme=scheme, bits_per_byte=2 + abs(rate - best), seed=run.seed)
        write_summary(self.out / run.name, result)
        return None

    monkeypatch.setattr(ablation.Runner, "_one", fake)
    out, content = tmp_path / "out", grid(tmp_path, {"scheme": ["a", "b", "c"]})
    args = ["ablate", "-c", tiny.distill_recipe, "--grid", content, "--seeds=5,6,7", "--out", out, "--jobs=2"]
    answer = bimamba(*args, "--tune=lr=1e-3,2e-3,4e-3")
    assert answer.code == 0, answer
    trials = [f"scheme-{scheme}-lr-{rate}-seed5" for scheme in "abc" for rate in (0.001, 0.002, 0.004)]
    rest = [f"scheme-{scheme}-seed{seed}" for scheme in ("a-lr-0.004", "b-lr-0.002") for seed in (6, 7)]
    assert sorted(ran[:9]) == sorted(trials) and sorted(ran[9:]) == rest
    report = (out / "report.md").read_text()
    assert "| scheme-a | 2.003 | failed | **2.000**\\* |" in report  # at the edge of the values
    assert "| scheme-b | 2.001 | **2.000** | 2.002 |" in report
    told = "scheme-a: its best lr, 0.004, is the highest of those tried (0.001, 0.002, 0.004), so a higher one may be"
    assert told in report and told in " ".join(answer.out.split())
    assert "with seed 5 only" in report and "With the other seeds (6, 7) only the chosen value was run" in report
    assert "| scheme-c | failed | failed | failed |" in report
    assert "| scheme-b-lr-0.002 | b | 2.000 ± 0.000 | 3 |" in report and "scheme-b-lr-0.001 |" not in report
    assert "failed: scheme-c-lr-0.001-seed5: diverged" in answer.out
    assert "| scheme-c-lr-0.001-seed5 | diverged |" in report
    assert "| scheme-a-lr-0.004 | `scheme=a` `lr=0.004` |" in report
    assert f"--grid {content} --seeds 5,6,7 --tune lr=0.001,0.002,0.004 --jobs 2 --out {out}\n" in report


@pytest.mark.parametrize(
    ("results", "edge"),
    [
        ({2: 5.0, 1: 4.0, 4: 6.0}, "lowest"),  # not in order
        ({2: 5.0, 1: 6.0, 4: 4.0}, "highest"),
        ({2: 4.0, 1: 5.0, 4: 6.0}, None),
        ({2: 4.0, 1: 4.0, 4: 4.0}, None),  # of no influence
        ({2: math.inf, 1: 4.0, 4: 6.0}, "lowest"),
        ({2: math.inf, 1: math.inf, 4: math.inf}, None),
        ({"tanh": 4.0, "bireal": 5.0}, None),
    ],
)
def test_a_best_value_at_the_edge_of_those_tried_is_told(results, edge):
    tried = Trials(Tuning("lr", tuple(results)), {"row": results}, [0])
    assert tried.at_the_edge() == ({} if edge is None else {"row": edge})
    assert len(tried.warnings()) == (edge is not None)


def test_the_settings_to_draw_are_chosen_by_name(tiny, bimamba, tmp_path, monkeypatch):
    def fake(self, run):
        write_summary(self.out / run.name, summary(name=run.name, scheme="a", bits_per_byte=run.seed, seed=run.seed))
        (self.out / run.name / "metrics.csv").write_text("step,flips/rate\n0,0.1\n")
        (self.out / run.name / "config.yaml").write_text(f"scheme: {run.setting['scheme']}")

    drawn = []
    monkeypatch.setattr(ablation.Runner, "_one", fake)
    monkeypatch.setattr("bimamba_lit.report.curves._logged", lambda path: drawn.append(path.parent.name) or [])
    args = ["ablate", "-c", tiny.distill_recipe, "--seeds=5,6", "--grid", grid(tmp_path, {"scheme": ["a", "b", "c"]})]
    answer = bimamba(*args, "--out", tmp_path / "out", "--curves", "scheme-b")
    assert answer.code == 0 and drawn == ["scheme-b-seed5", "scheme-b-seed6"], answer
    assert "--curves: nothing is drawn, as scheme-b logged neither signs nor scales" in answer.out
    answer = bimamba(*args, "--out", tmp_path / "other", "--curves", "scheme-d")
    assert answer.code == 1 and "has no setting scheme-d; did you mean" in answer.err
    assert not (tmp_path / "other").exists()


def test_a_grid_that_comes_along_is_told_by_its_name():
    told = command(["-c", "r.yaml", "--trainer.max_steps=5"], find_grid("schemes"), [], Path("out"), None, 1, ["FBI"])
    assert told == "bimamba ablate -c r.yaml --grid schemes --curves FBI --out out --set trainer.max_steps=5"


def test_jobs_run_at_once(tmp_path, monkeypatch):
    together = threading.Barrier(3)
    monkeypatch.setattr(ablation.Runner, "_one", lambda self, run: str(together.wait(timeout=20)))
    runner = ablation.Runner([], tmp_path / "out", jobs=3)
    assert sorted(runner.run(plan({"a-1": {}}, [0, 1, 2])).values()) == ["0", "1", "2"]


CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(next(arg for arg in sys.argv if "default_root_dir" in arg).split("=")[1])
def save(*_):
    (folder / "saved").touch()
    sys.exit("bimamba: stopped")
signal.signal(signal.SIGTERM, save)
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
(folder / "begun").touch()
time.sleep(60)
"""


LOOK = """
import os, pathlib, sys, time
folder = pathlib.Path(next(arg for arg in sys.argv if "default_root_dir" in arg).split("=")[1])
(folder / "saw").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
deadline = time.monotonic() + 30
while sum(1 for _ in folder.parent.glob("*/saw")) < 4 and time.monotonic() < deadline:
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    ("count", "named", "one", "all_of_them"),
    [
        (2, None, ["0", "0", "1", "1"], "0,1"),
        (2, "GPU-a, 3,7", ["3", "3", "GPU-a", "GPU-a"], "GPU-a,3"),  # of those named CUDA knows the first two only
        (1, "3", ["3"] * 4, "3"),
        (0, "", [""] * 4, ""),
        (0, None, ["unset"] * 4, "unset"),
    ],
)
def test_runs_are_spread_evenly_over_the_gpus_there_are(tmp_path, monkeypatch, count, named, one, all_of_them):
    """Four at once; then one that asks for two devices."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(ablation, "PROGRAM", (sys.executable, "-c", LOOK))
    runner = ablation.Runner(["--trainer.devices=1"], tmp_path, jobs=4)
    runs = plan({"one": {"a": 1}}, [0, 1, 2, 3])
    assert runner.run(runs) == {}
    assert sorted((tmp_path / run.name / "saw").read_text() for run in runs) == one
    runner.run([Run("two", {"trainer.devices": 2}, None)])
    assert (tmp_path / "two" / "saw").read_text() == all_of_them


def test_the_gpu_that_fewest_use_is_lent():
    gpus, one = Gpus(["0", "1"]), {"devices": 1}
    with gpus.lent(one) as first:
        with gpus.lent(one) as second, gpus.lent({"devices": "auto"}) as everything:
            assert [first, second, everything] == [{VISIBLE: "0"}, {VISIBLE: "1"}, {VISIBLE: "0,1"}]
        with gpus.lent(one) as third:
            assert third == {VISIBLE: "1"}
    with gpus.lent(one) as fourth:
        assert fourth == {VISIBLE: "0"}


def test_stopped_it_lets_its_runs_save_and_starts_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(ablation, "PROGRAM", (sys.executable, "-c", CHILD))
    runner = ablation.Runner([], tmp_path, jobs=2)

    def stop():
        while len(list(tmp_path.glob("*/begun"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with interruption.watched(), pytest.raises(Interrupted):
        runner.run(plan({"a-1": {}}, [0, 1, 2]))
    assert sorted(path.parent.name for path in tmp_path.glob("*/saved")) == ["a-1-seed0", "a-1-seed1"]
    assert not (tmp_path / "a-1-seed2").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "a-1-seed0: threads 3\n" in capsys.readouterr().out


def test_the_grids_that_come_along_are_right_for_the_protocol():
    from bimamba_lit.training.command_line import GROUPS
    from bimamba_lit.training.recipe_check import check_settings
    from bimamba_lit.training.recipe_read import read_settings

    recipe = files("bimamba_lit.recipes") / "protocol_student.yaml"
    names = [entry.name.removesuffix(".yaml") for entry in (files("bimamba_lit") / "grids").iterdir()]
    for name in names:
        for run in plan(read_grid(find_grid(name)), [0]):
            check_settings(read_settings(run.arguments(["-c", str(recipe)], Path("out"))[1:]), GROUPS)
    assert "schemes" in names
