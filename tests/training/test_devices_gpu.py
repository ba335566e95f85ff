"""Training on two GPUs: what comes out is what one makes, within the memory that is estimated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bimamba_lit import MambaConfig
from bimamba_lit.models import MambaLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings("default"),
]

TEXT = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n" * 2000
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


def write(folder: Path, name: str, devices: int, model: dict | None = None, size: int = 64, **trainer) -> Path:
    """Write the recipe of a run ``name``, with a batch of eight over all devices, and its teacher; return its file."""
    (folder / "text.txt").write_text(TEXT)
    config = MambaConfig(vocab_size=257, d_model=size, n_layer=4, headdim=32, d_state=32)
    torch.manual_seed(0)
    if not (folder / "teacher").exists():
        MambaLM(config).save_pretrained(folder / "teacher")
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "gpu",
            "devices": devices,
            "max_steps": 6,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "default_root_dir": str(folder / name),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder / "logs")},
            },
        }
        | trainer,
        "model": {
            "class_path": "bimamba_lit.training.Distill",
            "init_args": {
                "teacher": str(folder / "teacher"),
                "binarizer": {"class_path": "bimamba_lit.binarize.FBI"},
                "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "total_steps": 6},
            }
            | (model or {}),
        },
        "data": {
            "class_path": "bimamba_lit.data.TextDataModule",
            "init_args": {
                "train": str(folder / "text.txt"),
                "val": str(folder / "text.txt"),
                "context": 256,
                "batch_size": 8 // devices,
                "max_eval_tokens": 4000,
                "cache_dir": str(folder / "cache"),
            },
        },
    }
    file = folder / f"{name}-{devices}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def bimamba(command: str, file: Path, *args: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    }
    line = [sys.executable, "-m", "bimamba_lit", command, "-c", str(file), *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    return done.stdout


def weights(folder: Path) -> dict:
    return MambaLM.from_pretrained(folder / "checkpoints" / "last.ckpt").state_dict()


def differ(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_two_gpus_with_copies_train_as_one(tmp_path):
    bimamba("fit", write(tmp_path, "one", 1))
    bimamba("fit", write(tmp_path, "two", 2, strategy="ddp"))
    assert differ(tmp_path / "one", tmp_path / "two") < 1e-4


def test_two_gpus_that_share_everything_train_as_one_and_are_resumed_by_one(tmp_path):
    model = {"shard_teacher": True, "activation_checkpointing": True}
    bimamba("fit", write(tmp_path, "one", 1, model=model))
    bimamba("fit", write(tmp_path, "two", 2, model=model, strategy=SHARDED, max_steps=3))
    alone = SHARDED | {"init_args": SHARDED["init_args"] | {"data_parallel_size": 1}}
    bimamba("fit", write(tmp_path, "two", 1, model=model, strategy=alone), "--ckpt_path=last")
    assert differ(tmp_path / "one", tmp_path / "two") < 1e-4


def test_compiled_blocks_train_sharded_in_half_precision(tmp_path):
    model = {"shard_teacher": True, "activation_checkpointing": True, "compile": True}
    bimamba("fit", write(tmp_path, "two", 2, model=model, strategy=SHARDED, precision="bf16-mixed"))
    latents = [tensor for name, tensor in weights(tmp_path / "two").items() if name.endswith(".latent")]
    assert latents and all(tensor.dtype == torch.float32 for tensor in latents)


@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["copies", "shards"])
def test_each_of_two_gpus_takes_what_is_estimated(tmp_path, strategy):
    model = {"shard_teacher": strategy is SHARDED, "activation_checkpointing": True}
    file = write(tmp_path, "two", 2, model=model, size=1024, strategy=strategy, precision="bf16-mixed")
    found = bimamba("estimate", file)
    total = float(re.search(r"in all\D+([\d,.]+)", found)[1].replace(",", "")) * 1024**2
    most = int(re.search(r"PEAK (\d+)", bimamba("fit", file, "--trainer.callbacks+=test_estimate.Watch"))[1])
    print(found, total, most, total / most)
    assert abs(total - most) <= 0.10 * most, found
