"""Training on two processes: what comes out is what one process makes, and it can be read, resumed and moved."""

import csv
import os
import pickle
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml

from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM
from bimamba_lit.models.sharded_folder import _checked_index, check_sharded
from bimamba_lit.training.checkpoint_file import newest_whole

CALLBACKS = [
    {"class_path": f"bimamba_lit.callbacks.{name}", "init_args": {"every_n_steps": 2}}
    for name in ("BitFlips", "WeightScales")
]
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}
LATENT = "lm.backbone.layers.0.mixer.in_proj.latent"


def write(tiny, path: Path, devices: int = 2, model: dict | None = None, data: dict | None = None, **trainer) -> Path:
    """Write the recipe of a run in the folder ``path``, with a batch of four over all devices; return its file."""
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["trainer"] |= {"default_root_dir": str(path), "devices": devices, "callbacks": CALLBACKS, "max_steps": 6}
    recipe["trainer"] |= {"gradient_clip_val": 1.0} | trainer
    recipe["model"]["init_args"] |= model or {}
    recipe["model"]["init_args"]["optimizer"]["total_steps"] = 6
    recipe["data"]["init_args"] |= {"batch_size": 4 // devices} | (data or {})
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return file


def run(*args: object, torchrun: bool = False, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    started = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"] if torchrun else []
    command = [sys.executable, "-m", *started, "bimamba_lit", "fit", "-c", *map(str, args)]
    found = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)


def fitted(*args: object, **options) -> None:
    done = run(*args, **options)
    assert done.returncode == 0, done.stderr[-3000:]


def last(path: Path) -> Path:
    return path / "checkpoints" / "last.ckpt"


def weights(path: Path) -> dict:
    return MambaLM.from_pretrained(last(path)).state_dict()


def rows(path: Path, key: str) -> list[float]:
    with (path / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.fixture(scope="module")
def one(tiny, bimamba, tmp_path_factory):
    """A student trained by one process, with nothing of what is tried here."""
    folder = tmp_path_factory.mktemp("one") / "run"
    answer = bimamba("fit", "-c", write(tiny, folder, 1))
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The same by two processes: student, teacher, optimizer and checkpoint sharded, activations computed again."""
    folder = tmp_path_factory.mktemp("two") / "run"
    model = {"shard_teacher": True, "activation_checkpointing": True}
    fitted(write(tiny, folder, model=model, strategy=SHARDED))
    return folder


def test_two_processes_that_share_everything_train_as_one(one, two):
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6), name
    keys = ["train/loss", "val/loss", "val/agreement", "flips/rate", "flips/since_start"]
    for key in [*keys, "scales/backbone.layers.0.mixer.in_proj/std"]:
        assert rows(one, key) and rows(one, key) == pytest.approx(rows(two, key), rel=1e-5), key


def test_a_sharded_checkpoint_is_a_link_to_the_one_folder_there_is(two):
    assert sorted(path.name for path in last(two).parent.iterdir()) == ["last.0.shards", "last.ckpt"]
    assert {path.suffix for path in last(two).iterdir()} == {"", ".distcp", ".pt"}
    check_sharded(last(two))


def test_a_sharded_checkpoint_is_read_as_any_other(two, bimamba, tmp_path):
    answer = bimamba("convert", "--from", two, "--to", tmp_path / "plain")
    assert answer.code == 0, answer.err
    plain = MambaLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(two).items())
    for args in (["generate", "--prompt", "The"], ["export", "--format=safetensors", "--out", tmp_path / "packed"]):
        answer = bimamba(*args, "--ckpt", last(two))
        assert answer.code == 0, answer.err


def test_a_sharded_checkpoint_needs_a_strategy_that_loads_it(two, bimamba):
    answer = bimamba("validate", "-c", two / "config.yaml", "--ckpt_path=last", "--trainer.strategy=auto")
    assert answer.code == 1 and "is sharded" in answer.err and "bimamba convert --from" in answer.err


class Thief:
    def __reduce__(self):
        return os.mkdir, ("stolen",)


def _steal(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Thief()))


def _point_elsewhere(folder: Path) -> None:
    name = next(folder.glob("*.distcp")).name
    index = (folder / ".metadata").read_bytes()
    assert name.encode() in index
    shutil.copy(folder / name, folder.parent / name[3:])
    (folder / ".metadata").write_bytes(index.replace(name.encode(), f"../{name[3:]}".encode()))


def _shorten(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Allocate:
    def __reduce__(self):
        return bytearray, (1 << 36,)


def _allocate(folder: Path) -> None:
    index = _checked_index(folder)
    parts = [
        where for key, where in index.storage_data.items() if not hasattr(index.state_dict_metadata[key.fqn], "size")
    ]
    where = max(parts, key=lambda part: part.length)
    torch.save(Allocate(), value := BytesIO())
    assert len(value.getvalue()) <= where.length
    with (folder / where.relative_path).open("rb+") as file:
        file.seek(where.offset)
        file.write(value.getvalue().rjust(where.length, b"\0"))  # before it a zip file may have anything


DAMAGES = {
    "holds posix.mkdir": _steal,
    "is missing or cut short": _shorten,
    "missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "not written to its end": lambda folder: (folder / "meta.pt").unlink(),
    "is damaged": lambda folder: (folder / ".metadata").write_bytes(b"nothing"),
    "is not whole": _point_elsewhere,
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_sharded_checkpoint_that_is_not_whole_or_no_data_is_refused(two, tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    shutil.copytree(last(two), folder)
    DAMAGES[told](folder)
    for read in (check_sharded, MambaLM.from_pretrained):
        with pytest.raises(UserError, match=told):
            read(folder)
    assert not (tmp_path / "stolen").exists()


def test_a_sharded_checkpoint_with_a_value_that_asks_for_memory_is_refused(two, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(last(two), folder)
    check_sharded(folder)
    _allocate(folder)
    with pytest.raises(UserError, match="which is no plain value"):
        check_sharded(folder)


def test_last_passes_over_a_sharded_checkpoint_that_is_not_whole(two, tmp_path):
    whole, newest = tmp_path / "at-step=4.ckpt", tmp_path / "last.ckpt"
    for moment, path in enumerate((whole, newest)):
        shutil.copytree(last(two), path)
        os.utime(path, (moment, moment))
    (tmp_path / "lost.ckpt").symlink_to("lost.0.shards")
    assert newest_whole(tmp_path, newest.name) == (newest, [])
    _shorten(newest)
    found, (told,) = newest_whole(tmp_path, newest.name)
    assert found == whole
    assert told.startswith(f"{newest} is broken (") and "missing or cut short" in told


MODULE = '''
import os, signal
import lightning.pytorch as pl


class Kill(pl.Callback):
    """Kills the second process after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def module(tmp_path):
    (tmp_path / "killing.py").write_text(MODULE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_two_processes_is_killed_and_the_resumed_run_ends_as_if_it_had_not_been(
    tiny, one, tmp_path, module, streaming
):
    data = {}
    if streaming:
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text(tiny.text.read_text()[number:] * (number + 1))
        data = {"streaming": True, "train": str(tmp_path / "[0-9].txt")}
    whole, killed = (write(tiny, tmp_path / name, data=data, strategy="ddp") for name in ("whole", "killed"))
    fitted(whole, torchrun=True)
    kill = ["--trainer.callbacks+=killing.Kill", "--trainer.callbacks.after=4", "--checkpoint.every_n_train_steps=3"]
    assert run(killed, *kill, torchrun=True, path=module).returncode != 0
    assert torch.load(last(tmp_path / "killed"), weights_only=True)["global_step"] == 3
    fitted(killed, "--ckpt_path=last", torchrun=True)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows(tmp_path / "whole", "train/loss") == rows(tmp_path / "killed", "train/loss")
    if not streaming:
        assert all(torch.allclose(tensor, ours[name], atol=1e-6) for name, tensor in weights(one).items())


@pytest.mark.slow
def test_a_sharded_checkpoint_is_resumed_on_another_number_of_devices(tiny, one, two, tmp_path):
    folder = tmp_path / "run"
    fitted(write(tiny, folder, strategy=SHARDED, max_steps=3))
    alone = SHARDED | {"init_args": SHARDED["init_args"] | {"data_parallel_size": 1}}
    fitted(write(tiny, folder, 1, strategy=alone), "--ckpt_path=last")
    ours, theirs = weights(one), weights(folder)
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())
    assert rows(folder, "train/loss") == pytest.approx(rows(two, "train/loss"), rel=1e-5)


@pytest.mark.slow
def test_latent_weights_stay_in_fp32_where_it_is_computed_in_half_precision(tiny, tmp_path):
    strategy = SHARDED | {"init_args": SHARDED["init_args"] | {"save_distributed_checkpoint": False}}
    fitted(write(tiny, tmp_path / "run", strategy=strategy, precision="bf16-mixed"))
    saved = torch.load(last(tmp_path / "run"), weights_only=True)
    tensors = [*saved["state_dict"].values()]
    tensors += [value for state in saved["optimizer_states"][0]["state"].values() for value in state.values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert (saved["state_dict"][LATENT].bfloat16().float() != saved["state_dict"][LATENT]).any()


@pytest.mark.slow
def test_compiled_blocks_train_as_they_do_uncompiled(tiny, one, tmp_path):
    file = write(tiny, tmp_path / "run", 1, model={"compile": True, "activation_checkpointing": True})
    fitted(file)
    ours, theirs = weights(tmp_path / "run"), weights(one)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-4) for name, tensor in ours.items())


@pytest.mark.slow
def test_blocks_are_compiled_and_sharded_at_once(tiny, one, tmp_path):
    fitted(write(tiny, tmp_path / "run", model={"compile": True}, strategy=SHARDED))
    assert all(
        torch.allclose(tensor, weights(one)[name], atol=1e-4) for name, tensor in weights(tmp_path / "run").items()
    )


def test_a_teacher_is_not_sharded_by_a_strategy_that_shards_nothing(tiny, tmp_path):
    from bimamba_lit.training import Distill

    module = Distill(str(tiny.teacher), None, shard_teacher=True)
    module._trainer = type("Trainer", (), {"world_size": 2, "precision": "32-true"})()
    with pytest.raises(UserError, match="ModelParallelStrategy only"):
        module.configure_model()


def test_a_precision_that_would_round_latent_weights_is_refused(tiny, bimamba, tmp_path):
    answer = bimamba("fit", "-c", write(tiny, tmp_path / "run", 1, precision="bf16-true"))
    assert answer.code == 1 and "set bf16-mixed" in answer.err
