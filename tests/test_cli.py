import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bimamba_lit
from bimamba_lit.cli import main

ROOT = Path(__file__).parents[1]


def process(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bimamba_lit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_and_version(bimamba):
    for args in ([], ["--help"]):
        answer = bimamba(*args)
        assert answer.code == 0
        assert all(name in answer.out for name in ("fit", "validate", "generate", "compare", "recipes"))
    assert bimamba("--version").out == f"bimamba-lit {bimamba_lit.__version__}\n"


def test_fit_explains_itself(bimamba):
    answer = bimamba("fit", "--help")
    assert answer.code == 0 and answer.out.startswith("usage: bimamba fit -c RECIPE.yaml [--key value ...]\n")
    assert all(key in answer.out for key in ("--trainer.max_steps", "--checkpoint.every_n_train_steps", "--ckpt_path"))
    answer = bimamba("fit", "--model.help=Distill")
    assert answer.code == 0 and "--model.binarizer" in answer.out


def test_evaluate_says_how_long_a_hub_text_is_kept(bimamba):
    told = " ".join(bimamba("evaluate", "--help").out.split())
    assert "hub:OWNER/NAME" in told and "kept under its name" in told and "HF_DATASETS_CACHE" in told


def test_generate_is_the_same_for_a_seed(tiny, bimamba):
    args = ["generate", "--ckpt", tiny.teacher, "--prompt", "The ", "--max_new_tokens=12", "--seed=4"]
    first = bimamba(*args)
    assert first.code == 0 and first.out.startswith("The ")
    assert bimamba(*args).out == first.out


def test_compare_lays_runs_side_by_side(tiny, bimamba, tmp_path):
    out = tmp_path / "comparison"
    folder = tmp_path / "student"
    fit = ["fit", "-c", tiny.distill_recipe, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=1"]
    assert bimamba(*fit).code == 0
    answer = bimamba("compare", tiny.teacher, folder, "--out", out)
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in out.iterdir()) == ["report.csv", "report.md", "report.png", "report.tex"]
    assert f"Written: {out}/report.md, report.csv, report.tex and report.png" in answer.out
    with (folder / "metrics.csv").open("w") as file:
        file.write("step,flips/rate\n9,0.5\n19,0.25\n")
    answer = bimamba("compare", tiny.teacher, folder, "--out", out)
    assert answer.code == 0 and "report.png and curves.png" in answer.out and (out / "curves.png").exists()
    assert "FBI" in answer.out and "FBI" in (out / "report.md").read_text()
    with (out / "report.csv").open() as file:
        assert len(list(csv.reader(file))) == 3


def test_recipes_are_listed_and_copied(bimamba, tmp_path):
    listed = bimamba("recipes")
    assert listed.code == 0 and listed.out == bimamba("recipes", "ls").out
    assert {line.split()[0] for line in listed.out.splitlines()} == {path.name for path in ROOT.glob("recipes/*.yaml")}
    answer = bimamba("recipes", "cp", "quickstart_teacher", tmp_path / "mine")
    copy = tmp_path / "mine" / "quickstart_teacher.yaml"
    assert answer.code == 0 and str(copy) in answer.out
    assert copy.read_bytes() == (ROOT / "recipes" / "quickstart_teacher.yaml").read_bytes()
    again = bimamba("recipes", "cp", "quickstart_teacher.yaml", tmp_path / "mine")
    assert again.code == 1 and "is there already" in again.err
    onto_file = bimamba("recipes", "cp", "quickstart_teacher", copy)
    assert onto_file.code == 1 and "is a file" in onto_file.err


def test_a_table_is_printed_where_output_is_not_utf8(tiny, tmp_path):
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)) as out:
        main(["compare", str(tiny.teacher), "--out", str(tmp_path / "out")])
    assert "?" in (text := out.buffer.getvalue().decode("latin-1")) and f"Written: {tmp_path}" in text


# What only a process of its own shows.


def test_a_process_prints_no_clutter(tiny, tmp_path):
    done = process("fit", "-c", tiny.teacher_recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("MambaLM: 16,") and "full precision" in lines[0]
    assert lines[-1].startswith(f"{tmp_path / 'run'}: ") and "bits per byte after 10 steps" in lines[-1]
    assert all(line.startswith("step ") for line in lines[1:-1])
    for clutter in ("deprecated", "Epoch ", "FLOPs", "litlogger", "Traceback", "many workers"):
        assert clutter not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_process_ends_with_one_sentence(tiny, tmp_path):
    recipe = tiny.folder / "distil.yaml"
    done = process("fit", "-c", recipe, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"bimamba: there is no recipe {recipe}; did you mean 'distill.yaml'?\n"
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_the_package_is_said_to_be_copied(bimamba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, folder in (("distill", "."), ("distill.yaml", "."), ("mine/distill.yaml", "mine")):
        answer = bimamba("fit", "-c", path)
        copy = f"bimamba recipes cp distill.yaml {folder}"
        assert f"there is no recipe {path}; one comes with the package: `{copy}` copies it there" in answer.err
    assert bimamba(*copy.split()[1:]).code == 0 and (tmp_path / "mine" / "distill.yaml").is_file()
    assert "bimamba recipes` lists those" in bimamba("fit", "-c", "none_of_them").err


def test_the_program_by_its_name():
    name = Path(sys.executable).parent / "bimamba"
    if not name.exists():
        pytest.skip("the package is not installed with its scripts")
    done = subprocess.run([name, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == process("--version").stdout


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_goes_on(tiny, bimamba, tmp_path, kind):
    folder = tmp_path / "run"
    args = ["fit", "-c", str(tiny.teacher_recipe), f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]
    args += ["--checkpoint.every_n_train_steps=5"]
    command = [sys.executable, "-m", "bimamba_lit", *args, "--trainer.max_steps=1000000"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = folder / "checkpoints" / "last.ckpt"
    try:
        begun = time.monotonic()
        while not last.exists() and running.poll() is None and time.monotonic() < begun + 60:
            time.sleep(0.05)
        assert last.exists()
    finally:
        os.kill(running.pid, kind)
        assert running.wait(60) != 0
    import torch

    step = torch.load(last, weights_only=True)["global_step"]
    assert step % 5 == 0 or kind == signal.SIGTERM  # which is answered by a checkpoint
    answer = bimamba(*args, f"--trainer.max_steps={step + 3}")
    assert answer.code == 0, answer.err
    with (folder / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(step + 3))


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "bimamba_lit", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        running.stdout.close()
        assert running.stderr.read() == "" and running.wait(timeout=60) == 1
