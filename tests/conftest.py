"""What tests share: small models; for the commands one tiny text, one tiny recipe, one trained teacher."""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

TEACHER = {
    "seed_everything": 0,
    "trainer": {"accelerator": "cpu", "max_steps": 10, "log_every_n_steps": 1},
    "model": {
        "class_path": "bimamba_lit.training.Pretrain",
        "init_args": {
            "config": {"d_model": 32, "n_layer": 1, "headdim": 16, "d_state": 16, "chunk_size": 16},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        },
    },
    "data": {
        "class_path": "bimamba_lit.data.TextDataModule",
        "init_args": {"context": 32, "batch_size": 4, "max_eval_tokens": 400},
    },
}
SENTENCES = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n"


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Bimamba = Callable[..., Answer]


@dataclass(frozen=True)
class Tiny:
    """A folder with tiny recipes and a finished run of the teacher's."""

    folder: Path
    text: Path
    teacher_recipe: Path
    distill_recipe: Path
    teacher: Path


def run_command(*args: object) -> Answer:
    from bimamba_lit.cli import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code
        finally:
            sys.argv = argv
    if isinstance(code, str):
        err.write(code)
        code = 1
    assert code is None or isinstance(code, int)
    return Answer(code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def bimamba() -> Iterator[Bimamba]:
    """Runs a command in this process."""
    before = dict(os.environ)
    yield run_command
    os.environ.clear()
    os.environ.update(before)  # Lightning leaves the seed there


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, bimamba: Bimamba) -> Tiny:
    """The recipes and a teacher trained for 10 steps of 4 sequences of 32 bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text(SENTENCES * 20)
    recipe = yaml.safe_load(yaml.safe_dump(TEACHER))
    recipe["trainer"]["default_root_dir"] = str(folder / "teacher")
    recipe["data"]["init_args"] |= {"train": str(text), "val": str(text), "cache_dir": str(folder / "cache")}
    teacher_recipe = folder / "teacher.yaml"
    teacher_recipe.write_text(yaml.safe_dump(recipe))
    recipe["trainer"]["default_root_dir"] = str(folder / "student")
    recipe["model"] = {
        "class_path": "bimamba_lit.training.Distill",
        "init_args": {
            "teacher": str(folder / "teacher"),
            "binarizer": {"class_path": "bimamba_lit.binarize.FBI"},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        },
    }
    distill_recipe = folder / "distill.yaml"
    distill_recipe.write_text(yaml.safe_dump(recipe))
    answer = bimamba("fit", "-c", teacher_recipe, "--checkpoint.every_n_train_steps=4")
    assert answer.code == 0, answer
    return Tiny(folder, text, teacher_recipe, distill_recipe, folder / "teacher")


@pytest.fixture(autouse=True)
def freed_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives a GPU's memory back after each of its tests: several processes share one."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


Make = Callable[..., Any]


@pytest.fixture
def make() -> Make:
    """Build a small model whose every parameter differs from its neighbours and from its initial value."""

    def build(seed: int = 0, **options: object) -> Any:
        import torch

        from bimamba_lit import MambaConfig, MambaLM

        torch.manual_seed(seed)
        small = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 16, "chunk_size": 8}
        lm = MambaLM(MambaConfig.from_dict(small | options))
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return lm

    return build


@pytest.fixture
def error() -> Callable[[Any, Any], float]:
    """Relative error: root mean square of the difference over that of the reference."""
    return lambda value, reference: float((value - reference).detach().norm() / reference.detach().norm())
