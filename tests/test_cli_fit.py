import csv
import errno
import io
import json
from pathlib import Path

import pytest
import torch
import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM
from bimamba_lit.models.count import count_parameters, true_bits
from bimamba_lit.training import folder_lock, run_folder
from bimamba_lit.training.folder_lock import locked


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def rows(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_finished_run_has_its_four_files(tiny):
    assert {path.name for path in tiny.teacher.iterdir()} == {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    }
    assert [path.name for path in (tiny.teacher / "checkpoints").iterdir()] == ["last.ckpt"]
    # The last step is no multiple of every_n_train_steps.
    assert checkpoint(tiny.teacher)["global_step"] == 10


def test_the_summary_tells_what_was_trained(tiny):
    found, lm = summary(tiny.teacher), MambaLM.from_pretrained(tiny.teacher / "checkpoints" / "last.ckpt")
    assert (found["name"], found["scheme"], found["teacher"], found["seed"]) == ("teacher", "fp", None, 0)
    assert (found["params"], found["binarized_params"]) == tuple(count_parameters(lm))
    assert found["true_bits"] == true_bits(lm)
    assert found["tokens_seen"] == 10 * 4 * 32
    assert found["context"] == found["stride"] == 32
    assert len(found["eval_data"]["sha256"]) == 64 and found["eval_data"]["name"].startswith("text.txt")
    assert found["seconds"] > 0 and found["agreement"] is None


def test_metrics_hold_every_step_once_and_the_last_validation(tiny):
    found = rows(tiny.teacher)
    assert [int(row["step"]) for row in found] == list(range(10))
    assert all(row["train/loss"] for row in found)
    assert float(found[-1]["val/bits_per_byte"]) == pytest.approx(summary(tiny.teacher)["bits_per_byte"])


def test_the_same_configuration_again_is_refused_in_one_sentence(tiny, bimamba):
    before = {path: path.stat().st_mtime_ns for path in tiny.teacher.rglob("*")}
    for more in ([], ["--ckpt_path", "last"], ["--trainer.max_steps=5"]):
        answer = bimamba("fit", "-c", tiny.teacher_recipe, *more)
        assert answer.code == 1 and "holds a finished run" in answer.err and "Traceback" not in answer.err
    assert before == {path: path.stat().st_mtime_ns for path in tiny.teacher.rglob("*")}


def test_its_own_config_is_a_recipe_of_the_same_run(tiny, bimamba):
    answer = bimamba("fit", "-c", tiny.teacher / "config.yaml")
    assert answer.code == 1 and "holds a finished run" in answer.err


def test_another_configuration_goes_to_the_next_sibling_and_says_so(tiny, bimamba, tmp_path):
    base = tmp_path / "run"
    first = ["fit", "-c", tiny.teacher_recipe, "--trainer.default_root_dir", base, "--trainer.max_steps=1"]
    assert bimamba(*first).code == 0
    answer = bimamba(*first, "--seed_everything=1")
    assert answer.code == 0 and str(tmp_path / "run-2") in answer.out and "another configuration" in answer.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    assert yaml.safe_load((tmp_path / "run-2" / "config.yaml").read_text())["seed_everything"] == 1
    assert (tmp_path / "run-2" / "checkpoints" / "last.ckpt").is_file() and summary(tmp_path / "run-2")["seed"] == 1
    answer = bimamba(*first, "--seed_everything=1")
    assert answer.code == 1 and "run-2 holds a finished run" in answer.err


def test_two_runs_that_start_at_the_same_moment_do_not_share_a_folder(tiny, bimamba, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
    folder = tmp_path / "run"
    args = ["fit", "-c", tiny.teacher_recipe, "--trainer.default_root_dir", folder, "--trainer.max_steps=1"]
    with locked(folder, {}):  # as by a process that has not yet written its configuration
        answer = bimamba(*args)
    assert answer.code == 1 and f"another process trains in {folder}" in answer.err
    assert not list(folder.iterdir())
    assert bimamba(*args).code == 0
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="a run of another configuration has begun"), locked(folder, {}):
        pass
    with pytest.raises(UserError, match="holds a finished run"), locked(folder, yaml.safe_load(before)):
        pass
    assert (folder / "config.yaml").read_text() == before


@pytest.fixture(scope="module")
def whole(tiny, bimamba, tmp_path_factory):
    """Sixteen uninterrupted steps of a student: more than one epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer = bimamba("fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={folder}")
    assert answer.code == 0, answer.err
    return folder


LONG = ["--trainer.max_steps=40", "--model.optimizer.total_steps=40"]
SPEED = ("speed/tokens_per_second",)


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = checkpoint(one)["state_dict"], checkpoint(other)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for ours_, theirs_ in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in ours_.items() if k not in SPEED} == {
            k: v for k, v in theirs_.items() if k not in SPEED
        }
    assert summary(one)["tokens_seen"] == summary(other)["tokens_seen"]
    assert summary(one)["bits_per_byte"] == summary(other)["bits_per_byte"]


@pytest.mark.parametrize(
    ("every", "stop"),
    [(4, 6), (14, 15), (None, 30)],
    ids=["inside an epoch", "after an epoch's last step", "an epoch's own checkpoint"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, bimamba, whole, tmp_path, module, every, stop):
    folder = tmp_path / "run"
    args = ["fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={folder}"]
    args += [f"--checkpoint.every_n_train_steps={every}"] if every else []
    answer = bimamba(*args, f"--trainer.callbacks+={module}.Stop", f"--trainer.callbacks.at={stop}")
    assert answer.code == 1 and "killed" in answer.err
    assert not (folder / "summary.json").exists()

    answer = bimamba(*args)
    assert answer.code == 1 and "unfinished" in answer.err and "--ckpt_path last" in answer.err

    if every == 4:  # a look at the unfinished run does not make it a finished one
        answer = bimamba("validate", *args[1:], "--ckpt_path=last")
        assert answer.code == 0 and summary(folder)["tokens_seen"] == 4 * 4 * 32

    # Killed once more, inside the epoch it was resumed in.
    again = [*args, "--ckpt_path", "last", f"--trainer.callbacks+={module}.Stop", f"--trainer.callbacks.at={stop + 9}"]
    again += ["--checkpoint.every_n_train_steps=5"]
    assert bimamba(*again).code == 1 and checkpoint(folder)["global_step"] == (stop + 9) // 5 * 5
    answer = bimamba(*args, "--ckpt_path", "last")
    assert answer.code == 0, answer.err
    assert_same_run(folder, whole)


def test_the_same_recipe_twice_gives_the_same_weights(tiny, bimamba, whole, tmp_path):
    answer = bimamba("fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert answer.code == 0, answer.err
    assert_same_run(tmp_path / "run", whole)


def test_last_passes_over_a_broken_checkpoint_and_says_so(tiny, bimamba, whole, tmp_path):
    folder = tmp_path / "run"
    args = ["fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={folder}"]
    args += ["--checkpoint.filename=at-{step}", "--checkpoint.save_top_k=-1", "--checkpoint.every_n_train_steps=5"]
    assert bimamba(*args, "--trainer.max_steps=10").code == 0
    newest = folder / "checkpoints" / "at-step=10.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    answer = bimamba(*args, "--ckpt_path=last")
    assert answer.code == 0, answer.err
    kept = folder / "checkpoints" / "at-step=5.ckpt"
    assert f"{newest} is broken (it is no checkpoint, or is damaged or cut short); going on from {kept}" in answer.out
    (folder / "checkpoints" / "at-step=40.ckpt").rename(folder / "checkpoints" / "last.ckpt")
    assert_same_run(folder, whole)


def test_a_run_that_something_else_than_its_length_ends_keeps_its_last_weights(tiny, bimamba, tmp_path, module):
    args = ["fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    args += ["--checkpoint.every_n_train_steps=4", f"--trainer.callbacks+={module}.End", "--trainer.callbacks.at=7"]
    answer = bimamba(*args)
    assert answer.code == 0, answer.err
    assert checkpoint(tmp_path / "run")["global_step"] == 7


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_been_asked_at_once(tiny, bimamba, whole, tmp_path):
    folder = tmp_path / "run"
    args = ["fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={folder}"]
    assert bimamba(*args, "--trainer.max_steps=7").code == 0
    assert checkpoint(folder)["global_step"] == 7
    answer = bimamba(*args)
    assert answer.code == 1 and "--ckpt_path last" in answer.err
    assert bimamba(*args, "--ckpt_path=last").code == 0
    for name in (found := checkpoint(folder)["state_dict"]):
        assert torch.equal(found[name], checkpoint(whole)["state_dict"][name])
    assert [int(row["step"]) for row in rows(folder)] == list(range(40))


def test_last_with_nothing_to_resume_starts_from_the_beginning(tiny, bimamba, tmp_path):
    answer = bimamba(
        *["fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=1"],
        *["--ckpt_path", "last"],
    )
    assert answer.code == 0 and "starting from the beginning" in answer.out
    assert checkpoint(tmp_path / "run")["global_step"] == 1


def test_the_share_of_a_batch_that_a_device_gets_makes_no_other_run():
    def config(devices, batch_size, **more):
        data = {"class_path": "TextDataModule", "init_args": {"batch_size": batch_size} | more}
        return {"trainer": {"devices": devices}, "data": data, "model": {}}

    same = run_folder._is_same_run
    assert same(config(8, 4), config(4, 8)) and same(config(2, 2, eval_batch_size=4), config(1, 4))
    assert (
        same(config(8, 4), config("4", 8))
        and same(config(2, 4), config([0, 3], 4))
        and same(config("2,3", 2), config(1, 4))
    )
    assert same(config(8, 4), config(1, 4)) and same(config("auto", 4), config(1, 4))
    assert not same(config(8, 4), config(4, 4, context=9)) and not same(config(8, 4), config(4, 6))


def test_what_changes_the_result_makes_another_run_and_what_does_not_makes_none():
    config = {"seed_everything": 0, "trainer": {"max_steps": 9}, "model": {"init_args": {"lr": 1.0}}}
    config |= {"data": {"init_args": {"seed": 0}}}
    same = run_folder._is_same_run
    for key, value in {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "gradient_clip_algorithm": "value",
        "limit_train_batches": 3,
        "overfit_batches": 1,
    }.items():
        assert not same(config, config | {"trainer": config["trainer"] | {key: value}}), key
    for part, other in (
        ("seed_everything", 1),
        ("model", {"init_args": {"lr": 2.0}}),
        ("data", {"init_args": {"seed": 1}}),
    ):
        assert not same(config, config | {part: other})
    for key in ("workers", "cache_dir"):
        for streaming in (False, True):  # workers read shards of their own of a stream
            data = [{"init_args": {"streaming": streaming, key: value}} for value in (1, 2)]
            assert same(config | {"data": data[0]}, config | {"data": data[1]}) is not (streaming and key == "workers")
    for part, other in (
        ("trainer", {"max_steps": 99, "log_every_n_steps": 5, "devices": 2}),
        ("data", {"init_args": {"seed": 0, "test": "other.txt"}}),
        ("tests", ["other.txt"]),
        ("model", {"init_args": {"lr": 1.0, "activation_checkpointing": True}}),
        ("checkpoint", {"every_n_train_steps": 5}),
    ):
        assert same(config, config | {part: other}), part


def test_checkpoints_by_epochs_are_those_of_the_epochs_that_are_due(tiny, bimamba, tmp_path):
    args = ["fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", "--data.context=128"]
    args += ["--trainer.max_steps=-1", "--trainer.max_epochs=5", "--model.optimizer.total_steps=99"]
    args += ["--checkpoint.every_n_epochs=2", "--checkpoint.every_n_train_steps=null", "--checkpoint.save_top_k=-1"]
    answer = bimamba(*args, "--checkpoint.filename=at-{epoch}")
    assert answer.code == 0, answer.err
    assert {path.stem for path in (tmp_path / "run" / "checkpoints").glob("at-*")} == {
        "at-epoch=1",
        "at-epoch=3",
        "at-epoch=4",
    }


def test_a_run_goes_on_with_more_workers_and_in_less_memory(tiny, bimamba, whole, tmp_path, module):
    args = ["fit", "-c", tiny.distill_recipe, *LONG, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    stop = [f"--trainer.callbacks+={module}.Stop", "--trainer.callbacks.at=17", "--checkpoint.every_n_train_steps=5"]
    assert bimamba(*args, *stop).code == 1
    answer = bimamba(*args, "--ckpt_path=last", "--data.workers=1", "--model.activation_checkpointing=true")
    assert answer.code == 0 and "another configuration" not in answer.out, answer
    assert_same_run(tmp_path / "run", whole)


def test_a_stream_is_resumed_with_the_batch_it_stopped_at(tiny, bimamba, tmp_path, module):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(tiny.text.read_text()[number:])
    args = ["fit", "-c", tiny.teacher_recipe, "--data.streaming=true", f"--data.train={text}/*.txt"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert bimamba(*args, f"--trainer.default_root_dir={whole}").code == 0
    args += [f"--trainer.default_root_dir={killed}", "--checkpoint.every_n_train_steps=3"]
    assert bimamba(*args, f"--trainer.callbacks+={module}.Stop", "--trainer.callbacks.at=5").code == 1
    assert bimamba(*args, "--ckpt_path=last").code == 0
    assert_same_run(killed, whole)


def test_a_file_where_the_run_folder_should_be(tiny, bimamba):
    answer = bimamba("fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tiny.text}")
    assert answer.code == 1 and f"{tiny.text} is a file, not a folder" in answer.err


@pytest.mark.parametrize("text", ["[" * 5000, "a: [", "\xff"])
def test_a_configuration_that_cannot_be_read_is_of_another_run(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text, encoding="latin-1")
    assert run_folder._first_free_or_own(tmp_path / "run", {"seed_everything": 1}) == tmp_path / "run-2"


def test_a_run_folder_that_cannot_be_made_or_written(tiny, bimamba, tmp_path, monkeypatch):
    args = ["fit", "-c", tiny.teacher_recipe]
    answer = bimamba(*args, f"--trainer.default_root_dir={tiny.text / 'runs' / 'one'}")
    assert answer.code == 1 and f"since {tiny.text} is a file, not a folder" in answer.err
    locked = tmp_path / "locked"
    locked.mkdir()

    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(run_folder, "TemporaryFile", refuse)
    answer = bimamba(*args, f"--trainer.default_root_dir={locked / 'run'}")
    assert answer.code == 1 and f"{locked / 'run'} cannot be written to (Read-only" in answer.err
    assert not list(locked.iterdir())

    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "TemporaryFile", lambda dir: Full())
    answer = bimamba(*args, f"--trainer.default_root_dir={locked / 'run'}")
    assert answer.code == 1 and f"{locked / 'run'} cannot be written to (No space left on device)" in answer.err
    assert not list(locked.iterdir())


def test_every_checkpoint_that_is_kept_is_named_by_its_step(tiny, bimamba, tmp_path):
    folder = tmp_path / "run"
    answer = bimamba(
        "fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=3",
        "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1", "--checkpoint.filename=at-{step}",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"at-step=2.ckpt", "at-step=3.ckpt"}


def test_a_validation_at_the_last_step_is_not_repeated(tiny, bimamba, tmp_path, module):
    args = ["fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    args += ["--trainer.val_check_interval=5", f"--trainer.callbacks+={module}.CountValidations"]
    answer = bimamba(*args)
    assert answer.code == 0, answer.err
    assert answer.out.count("counted a validation") == 2
    assert "bits_per_byte" in summary(tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [int(row["step"]) for row in found if row["val/loss"]] == [4, 9]


# What field-notes call the traps of LightningCLI


def test_a_checkpoint_never_overrides_the_command_line(tiny, bimamba, whole):
    args = ["validate", "-c", tiny.distill_recipe, *LONG, "--ckpt_path", whole / "checkpoints" / "last.ckpt"]
    folder = whole.parent / "warm"
    answer = bimamba(*args, "--model.temperature=3", "--data.context=16", f"--trainer.default_root_dir={folder}")
    assert answer.code == 0, answer.err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["temperature"] == 3
    assert summary(folder)["context"] == 16


def test_interpolation_works_in_a_recipe_and_does_not_beat_the_command_line(tiny, bimamba, tmp_path):
    recipe = yaml.safe_load(tiny.teacher_recipe.read_text())
    recipe["data"]["init_args"]["seed"] = "${seed_everything}"
    recipe["data"]["init_args"]["context"] = "${model.init_args.config.chunk_size}"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    args = ["fit", "-c", path, "--trainer.max_steps=1", "--data.seed=7"]
    answer = bimamba(*args, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert answer.code == 0, answer.err
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert (data["context"], data["seed"]) == (16, 7)


def test_callbacks_are_appended_and_schemes_swapped(tiny, bimamba, tmp_path):
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["trainer"]["callbacks"] = [{"class_path": "bimamba_lit.callbacks.BitFlips"}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    args = ["fit", "-c", path, "--trainer.max_steps=1", "--trainer.callbacks+=bimamba_lit.callbacks.WeightScales"]
    args += ["--trainer.callbacks.every_n_steps=1", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    answer = bimamba(*args, "--model.binarizer=FBI", "--model.binarizer.pattern=row")
    assert answer.code == 0, answer.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [one["class_path"].split(".")[-1] for one in config["trainer"]["callbacks"]] == ["BitFlips", "WeightScales"]
    assert config["model"]["init_args"]["binarizer"]["init_args"]["pattern"] == "row"
    assert any(name.startswith("scales/") for name in rows(tmp_path / "run")[0])

    answer = bimamba(*args, "--model.binarizer=ScaledSign")
    assert answer.code == 0, answer.err
    assert summary(tmp_path / "run-2")["scheme"] == "ScaledSign"


def test_a_scheme_from_outside_the_package(tiny, bimamba, tmp_path, module):
    args = ["fit", "-c", tiny.distill_recipe, "--trainer.max_steps=1", f"--model.binarizer={module}.MyScheme"]
    answer = bimamba(*args, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert answer.code == 0, answer.err
    assert summary(tmp_path / "run")["scheme"] == "MyScheme"
    asked = ["generate", "--ckpt", tmp_path / "run", "--prompt", "The", "--max_new_tokens", "4"]
    assert bimamba(*asked, "--import", module).code == 0
    answer = bimamba(*asked, "--import", "no_such_module")
    assert answer.code == 1 and "no_such_module" in answer.err and "PYTHONPATH" in answer.err


def test_nobody_reads_the_number_of_batches_that_resets_the_loader():
    import bimamba_lit

    package = Path(bimamba_lit.__file__).parent
    assert not [path for path in package.rglob("*.py") if "estimated_stepping_batches" in path.read_text()]


MODULE = '''
import lightning.pytorch as pl
from bimamba_lit.binarize import Sign


class MyScheme(Sign):
    """A scheme of a user's."""


class Stop(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


class End(Stop):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        trainer.should_stop = trainer.global_step + 1 == self.at


class CountValidations(pl.Callback):
    def on_validation_start(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            print("counted a validation")
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    (folder / "my_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "my_module"
