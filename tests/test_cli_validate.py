"""`bimamba validate` and `bimamba test`, as a user runs them."""

import json
from pathlib import Path

import pytest

from bimamba_lit.training.record import SaveConfig


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_validate_measures_again_and_touches_nothing_else(tiny, bimamba):
    kept = [tiny.teacher / "metrics.csv", tiny.teacher / "config.yaml", tiny.teacher / "checkpoints" / "last.ckpt"]
    before, contents = summary(tiny.teacher), [path.read_bytes() for path in kept]
    (tiny.teacher / "summary.json").unlink()
    answer = bimamba("validate", "-c", tiny.teacher_recipe, "--ckpt_path", "last")
    assert answer.code == 0, answer.err
    assert f"{before['bits_per_byte']:.3f} bits per byte" in answer.out
    assert summary(tiny.teacher) | {"seconds": 0} == before | {"seconds": 0}
    assert [path.read_bytes() for path in kept] == contents


def test_validate_of_another_checkpoint_leaves_the_summary_of_the_run(tiny, bimamba, tmp_path):
    other = tmp_path / "other.ckpt"
    other.write_bytes((tiny.teacher / "checkpoints" / "last.ckpt").read_bytes())
    before = (tiny.teacher / "summary.json").read_bytes()
    answer = bimamba("validate", "-c", tiny.teacher_recipe, "--ckpt_path", other)
    assert answer.code == 0, answer.err
    assert "bits per byte" in answer.out and "is left as it is" in answer.out
    assert (tiny.teacher / "summary.json").read_bytes() == before


def test_validate_of_what_training_has_gone_on_from_leaves_the_summary_of_the_run(tiny, bimamba, monkeypatch):
    last = tiny.teacher / "checkpoints" / "last.ckpt"
    before = (tiny.teacher / "summary.json").read_bytes()

    def trained_on(*_):
        (newer := last.with_suffix(".new")).write_bytes(last.read_bytes())
        newer.replace(last)

    monkeypatch.setattr(SaveConfig, "on_validation_start", trained_on)
    answer = bimamba("validate", "-c", tiny.teacher_recipe, "--ckpt_path", "last")
    assert answer.code == 0 and "bits per byte" in answer.out and "is left as it is" in answer.out, answer
    assert (tiny.teacher / "summary.json").read_bytes() == before


def test_validate_without_a_checkpoint_where_there_is_one_is_refused(tiny, bimamba):
    answer = bimamba("validate", "-c", tiny.teacher_recipe)
    assert answer.code == 1 and "--ckpt_path last" in answer.err


def test_validate_of_an_untrained_student_is_post_training_binarization(tiny, bimamba, tmp_path):
    folder = tmp_path / "run"
    args = ["-c", tiny.distill_recipe, f"--trainer.default_root_dir={folder}"]
    assert bimamba("validate", *args, "--model.binarizer=ScaledSign").code == 0
    found = summary(folder)
    assert (found["scheme"], found["tokens_seen"]) == ("ptb.ScaledSign", 0)
    assert found["binarized_params"] > 0 and 0 <= found["agreement"] < 1
    assert Path(found["teacher"]).name == "teacher"
    assert not (folder / "metrics.csv").exists() and not (folder / "checkpoints").exists()


def test_test_prints_its_figures(tiny, bimamba):
    before = summary(tiny.teacher)
    args = ["-c", tiny.teacher_recipe, "--ckpt_path=last", f"--data.test={tiny.text}"]
    answer = bimamba(
        "test", *args, f"--trainer.default_root_dir={tiny.folder / 'tested'}", "--ckpt_path", before_ckpt(tiny)
    )
    assert answer.code == 0, answer.err
    assert f"test: {before['bits_per_byte']:.3f} bits per byte" in answer.out


def test_another_text_to_test_on_is_still_the_same_run(tiny, bimamba, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow.\n" * 9)
    answer = bimamba("test", "-c", tiny.teacher_recipe, "--ckpt_path=last", f"--data.test={other}")
    assert answer.code == 0 and "another configuration" not in answer.out + answer.err


@pytest.mark.parametrize("command", ["validate", "test"])
def test_without_a_checkpoint_the_last_one_is_not_measured(command, tiny, bimamba):
    answer = bimamba(command, "-c", tiny.teacher_recipe, "--ckpt_path=last", "--seed_everything=9")
    assert answer.code == 1 and f"there is no whole checkpoint to {command}: " in answer.err
    assert "holds a run of another configuration" in answer.err and not Path(f"{tiny.teacher}-2").exists()


def test_the_recipes_tests_are_measured_at_the_end_and_leave_the_validation_as_it_is(tiny, bimamba, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow.\n" * 9)
    folder = tmp_path / "run"
    args = ["-c", tiny.teacher_recipe, f"--trainer.default_root_dir={folder}", f"--tests=[{tiny.text}, {other}]"]
    answer = bimamba("fit", *args)
    assert answer.code == 0, answer
    found, alone = summary(folder), summary(tiny.teacher)
    assert {key: found[key] for key in ("bits_per_byte", "eval_data")} == {
        key: alone[key] for key in ("bits_per_byte", "eval_data")
    }
    first, second = found["tests"]
    assert (first["sha256"], first["bits_per_byte"]) == (found["eval_data"]["sha256"], found["bits_per_byte"])
    answer = bimamba("test", *args[:2], f"--ckpt_path={folder}/checkpoints/last.ckpt", f"--data.test={other}")
    assert f"test: {second['bits_per_byte']:.3f} bits per byte" in answer.out

    answer = bimamba("fit", "-c", tiny.teacher_recipe, "--tests=[nowhere.txt]", f"--trainer.default_root_dir={folder}2")
    assert answer.code == 1 and "tests: 'nowhere.txt' is not a file" in answer.err
    assert not Path(f"{folder}2").exists()


def before_ckpt(tiny) -> Path:
    return tiny.teacher / "checkpoints" / "last.ckpt"
