import json
from pathlib import Path

import pytest
import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.training import ablation
from bimamba_lit.training.ablation import Run, plan, read_grid


def grid(folder: Path, content: object) -> Path:
    path = folder / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_mapping_is_all_combinations_and_a_list_each_of_its_blocks(tmp_path):
    assert read_grid(grid(tmp_path, {"a": [1, 2], "b": "x"})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    blocks = [{"a": 1}, {"b": [[1, 2], [3]]}]
    assert read_grid(grid(tmp_path, blocks)) == [{"a": 1}, {"b": [1, 2]}, {"b": [3]}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1", "is not YAML"),
        ("just text", "is no grid"),
        ("", "is no grid"),
        ({1: [2]}, "is no grid"),
        ([], "is empty"),
        ({"a": []}, "a has no value"),
    ],
)
def test_what_is_no_grid_is_told(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_grid(grid(tmp_path, content))
    with pytest.raises(UserError, match="there is no grid"):
        read_grid(tmp_path / "none.yaml")


def test_every_run_has_a_name_of_its_own_and_all_its_settings():
    settings = [
        {"model.binarizer": "bimamba_lit.binarize.FBI", "model.binarizer.pattern": "row", "model.targets": ["in_proj"]},
        {"model.binarizer": "other.FBI", "model.binarizer.pattern": "row", "model.targets": ["in_proj"]},
    ]
    runs = plan(settings, [0, 1])
    name = "binarizer-FBI-pattern-row-targets-in_proj"
    assert [run.name for run in runs] == [f"{name}-seed0", f"{name}-seed1", f"{name}-2-seed0", f"{name}-2-seed1"]
    assert runs[1].arguments(Path("r.yaml"), Path("out")) == [
        "fit", "-c", "r.yaml", "--model.binarizer=bimamba_lit.binarize.FBI", "--model.binarizer.pattern=row",
        "--model.targets=[in_proj]", "--seed_everything=1", "--data.seed=1", "--trainer.default_root_dir=out",
        "--ckpt_path=last",
    ]  # fmt: skip
    assert plan([{"a": 1}], []) == [Run("a-1", {"a": 1}, None)]


def test_what_stands_twice_is_told():
    with pytest.raises(UserError, match="the setting a-1 twice"):
        plan([{"a": 1}, {"a": 1}], [])
    with pytest.raises(UserError, match="a seed twice"):
        plan([{"a": 1}], [0, 0])


def test_a_grid_runs_to_one_report_and_is_not_run_again(tiny, bimamba, tmp_path, monkeypatch):
    content = {"model.binarizer": ["bimamba_lit.binarize.FBI", "bimamba_lit.binarize.Sing"]}
    out = tmp_path / "out"
    args = ["ablate", "-c", tiny.distill_recipe, "--grid", grid(tmp_path, content), "--seeds=3", "--out", out]
    answer = bimamba(*args)
    assert answer.code == 0, answer
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "ablation.yaml", "report.md", "report.csv", "report.tex", "report.png",
    }  # fmt: skip
    report = (out / "report.md").read_text()
    assert "| binarizer-FBI-seed3 | FBI |" in report.replace("\\", "")
    assert json.loads((out / "binarizer-FBI-seed3" / "summary.json").read_text())["seed"] == 3
    config = yaml.safe_load((out / "binarizer-FBI-seed3" / "config.yaml").read_text())
    assert config["data"]["init_args"]["seed"] == 3
    assert "failed: binarizer-Sing-seed3" in answer.out and "did you mean" in answer.out

    ran = []
    monkeypatch.setattr(ablation, "_run", lambda run, recipe, folder: ran.append(run.name) or "not run")
    answer = bimamba(*args)
    assert answer.code == 0 and answer.out.count("finished already") == 1
    assert ran == ["binarizer-Sing-seed3"]

    args[2] = tiny.teacher_recipe
    answer = bimamba(*args)
    assert answer.code == 1 and "holds an ablation of another recipe" in answer.err


def test_when_nothing_comes_to_its_end_it_is_an_error(tiny, bimamba, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "_run", lambda *args: "out of memory")
    answer = bimamba("ablate", "-c", tiny.teacher_recipe, "--grid", grid(tmp_path, {"a": 1}), "--out", tmp_path / "out")
    assert answer.code == 1 and "no run of" in answer.err and "out of memory" in answer.err
