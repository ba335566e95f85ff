"""The estimate of memory beside what a step is measured to take."""

import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from bimamba_lit import MambaConfig
from bimamba_lit.binarize import FBI, Unfinished
from bimamba_lit.callbacks import Progressive
from bimamba_lit.training import AdamW, Distill, Pretrain
from bimamba_lit.training.estimate import Devices, Estimate, estimate_step

VOCABULARY = 4096


def student(teacher: str, **options) -> Distill:
    return Distill(teacher, FBI, optimizer=AdamW(warmup_steps=1), **options)


def config(**sizes) -> MambaConfig:
    return MambaConfig(
        **({"d_model": 128, "n_layer": 3, "vocab_size": VOCABULARY, "headdim": 32, "d_state": 32} | sizes)
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from bimamba_lit import MambaLM

    folder = tmp_path_factory.mktemp("teacher")
    MambaLM(config()).save_pretrained(folder)
    return str(folder)


def settings(**options) -> SimpleNamespace:
    defaults = {"precision": "32-true", "accumulate_grad_batches": 1, "gradient_clip_val": 1.0}
    return SimpleNamespace(**(defaults | options))


def estimated(
    module, gpu: bool = False, count: int = 1, sharded: bool = False, context: int = 256, unfinished=None, **options
) -> Estimate:
    data = SimpleNamespace(batch_size=4, context=context)
    return estimate_step(module, data, Devices(gpu, count, sharded), settings(**options), unfinished)


class Watch(pl.Callback):
    """Measures and prints the most memory that a run takes: on a GPU in its third step, on a CPU from the beginning."""

    def __init__(self) -> None:
        self.most = 0
        self.profile = None
        if not torch.cuda.is_available():
            self.profile = torch.profiler.profile(profile_memory=True)
            self.profile.start()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 2 and self.profile is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx != 2:
            return
        if self.profile is None:
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.profile.stop()
            events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            ordered = sorted(events, key=lambda event: event.start_ns())
            self.most = max(accumulate(event.nbytes() for event in ordered))
        if trainer.is_global_zero:
            print(f"PEAK {self.most}", flush=True)


def measured(module, folder, gpu: bool = False, context: int = 256, callbacks=(), **options) -> int:
    ids = torch.randint(VOCABULARY, (4, context + 1))
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        max_steps=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch, *callbacks],
        **vars(settings(**options)),
    )
    batches = DataLoader([{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * 3, batch_size=None)
    trainer.fit(module, batches, batches)
    module._teacher.clear()  # which Lightning does not know, and so leaves on its device
    return watch.most


CASES = {
    "a teacher": lambda teacher: (Pretrain(config(), AdamW(warmup_steps=1)), {}),
    "a student": lambda teacher: (student(teacher), {}),
    "activations computed again": lambda teacher: (student(teacher, activation_checkpointing=True), {}),
    "in half precision": lambda teacher: (student(teacher), {"precision": "bf16-mixed"}),
    "two signs for some inputs": lambda teacher: (student(teacher, double_inputs={"*_proj": 0.15}), {}),
    "of mamba": lambda teacher: (Pretrain(config(mixer="mamba", d_state=16), AdamW(warmup_steps=1)), {}),
    "large weights": lambda teacher: (Pretrain(config(d_model=384), AdamW(warmup_steps=1)), {}),
}
OFTEN = ("a student", "in half precision", "of mamba")


@pytest.mark.parametrize(
    "case", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_the_estimate_is_what_a_step_on_a_cpu_is_measured_to_take(case, teacher, tmp_path):
    (module, options), (again, _) = CASES[case](teacher), CASES[case](teacher)
    found = estimated(module, **options)
    most = measured(again, tmp_path, **options)
    assert abs(found.total - most) <= 0.01 * most, (found, most)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tanh", "mix", "rows", "layers"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_layers_on_their_way_to_binary_take_what_is_estimated(way, teacher, tmp_path):
    begun = Unfinished("mix" if way == "layers" else way, 0.0)
    found = estimated(student(teacher), context=32, unfinished=begun)
    most = measured(student(teacher), tmp_path, context=32, callbacks=[Progressive(way, 1000)])
    assert abs(found.total - most) <= 0.01 * most, (found, most)


def test_a_recipe_that_makes_layers_binary_by_a_temperature_is_counted_with_it(tiny, bimamba, tmp_path):
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["model"]["init_args"]["student"] = {"d_model": 256, "n_layer": 2, "headdim": 64}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def told(*settings):
        answer = bimamba("estimate", "-c", path, "--trainer.accelerator=gpu", *settings)
        assert answer.code == 0, answer.err
        return {name: float(re.search(rf"{name}\D+([\d.]+)", answer.out)[1]) for name in ("latent weights", "in all")}

    way = ["--trainer.callbacks.by=tanh", "--trainer.callbacks.end_step=0.9"]
    binary, begun = told(), told("--trainer.callbacks+=Progressive", *way)
    assert told("--trainer.callbacks=Progressive", *way) == begun  # one, not in a list
    # A binary layer keeps a bit a weight for its backward pass, the temperature 4 bytes.
    assert begun["in all"] - binary["in all"] == pytest.approx(binary["latent weights"], rel=0.25)


def test_two_devices_hold_half_of_what_is_sharded(teacher):
    whole = estimated(student(teacher), gpu=True).parts
    copies = estimated(student(teacher), gpu=True, count=2).parts
    shards = estimated(student(teacher, shard_teacher=True), gpu=True, count=2, sharded=True).parts
    for part in ("latent weights", "gradients", "optimizer states", "teacher"):
        assert copies[part] == whole[part] and shards[part] == pytest.approx(whole[part] / 2, abs=1)
    assert copies["DDP's buckets of gradients"] == copies["gradients"]
    assert shards["activations"] == whole["activations"] and shards["gathered weights and gradients"] > 0


def test_the_backward_pass_of_shards_gathers_the_roots_gradients_and_those_of_a_block():
    from bimamba_lit import MambaLM

    lm = MambaLM(config())
    size, block = (4 * sum(p.numel() for p in part.parameters()) for part in (lm, lm.backbone.layers[0]))
    root = size - 3 * block
    few = estimated(Pretrain(config(), AdamW(warmup_steps=1)), count=2, sharded=True, context=16).parts
    assert "backward pass" in few and few["gathered weights and gradients"] == 2 * root + 4 * block


def test_accumulated_gradients_are_there_in_the_backward_pass(teacher):
    one, several = (estimated(student(teacher), accumulate_grad_batches=count).total for count in (1, 2))
    assert several >= one


def test_the_command_tells_the_parts_and_reads_no_weights(tiny, bimamba, teacher, tmp_path):
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": SHARDED, "precision": "bf16-mixed"}
    recipe["model"]["init_args"] |= {"student": {"d_model": 64, "n_layer": 2, "headdim": 16}, "shard_teacher": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    answer = bimamba("estimate", "-c", path, "--trainer.num_nodes=2")
    assert answer.code == 0, answer.err
    assert "16 GPUs, FSDP2" in answer.out and "latent weights" in answer.out and "in all" in answer.out
    assert not list(tmp_path.glob("runs*"))
    answer = bimamba("estimate", "-c", path, "--trainer.devices=2,3")
    assert answer.code == 0 and "each of 2 GPUs, FSDP2" in answer.out
    answer = bimamba("estimate", "-c", path, "--trainer.devices=two")
    assert answer.code == 1 and "'two' names no devices" in answer.err
    for setting in ("devices=0", "num_nodes=0", "strategy=fsdp", "strategy=nonsense", "precision=bf16-true"):
        answer = bimamba("estimate", "-c", path, f"--trainer.{setting}")
        assert answer.code == 1 and setting.partition("=")[0] in answer.err and not answer.out, setting
    answer = bimamba("estimate", "-c", path, "--model.tempreature=2")
    assert answer.code == 1 and "temperature" in answer.err
    answer = bimamba("estimate", "-c", Path(__file__).parents[2] / "recipes" / "ptb_sign.yaml")
    assert answer.code == 1 and "not a PTB" in answer.err


def test_a_teacher_on_disk_takes_its_distributions_alone(tiny, bimamba, tmp_path):
    assert bimamba("teacher-logits", "-c", tiny.distill_recipe, "--out", tmp_path / "logits", "--top_k=20").code == 0
    settings = [f"--model.teacher={tmp_path / 'logits'}", f"--model.student={tiny.teacher}"]
    answer = bimamba("estimate", "-c", tiny.distill_recipe, *settings)
    assert answer.code == 0, answer.err
    assert "teacher's distributions" in answer.out and "teacher's activations" not in answer.out


SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 16, "tensor_parallel_size": 1},
}


TWO = {
    # What DDP first copies to broadcast is let go of by a thread that the profiler does not see: no broadcast here.
    "DDP": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "dict_kwargs": {"init_sync": False}},
    "FSDP2": SHARDED | {"init_args": SHARDED["init_args"] | {"data_parallel_size": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "within"), [("DDP", 0.01), ("FSDP2", 0.05)])
def test_each_of_two_processes_takes_what_is_estimated(tiny, bimamba, tmp_path, strategy, within):
    from bimamba_lit import MambaLM

    MambaLM(config(d_model=512, n_layer=4, vocab_size=257)).save_pretrained(tmp_path / "teacher")
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["trainer"] |= {"devices": 2, "strategy": TWO[strategy], "gradient_clip_val": 1.0}
    recipe["trainer"] |= {"max_steps": 3, "default_root_dir": str(tmp_path / "run")}
    recipe["model"]["init_args"] |= {"teacher": str(tmp_path / "teacher"), "shard_teacher": strategy == "FSDP2"}
    recipe["data"]["init_args"] |= {"context": 128, "batch_size": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    }
    line = [sys.executable, "-m", "bimamba_lit", "fit", "-c", str(path), "--trainer.callbacks+=test_estimate.Watch"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    most = int(re.search(r"PEAK (\d+)", done.stdout)[1])
    total = float(re.search(r"in all\D+([\d,.]+)", bimamba("estimate", "-c", path).out)[1].replace(",", "")) * 2**20
    print(f"{strategy}: estimated {total / most:.4f} of what was measured")
    assert abs(total - most) <= within * most, (total / most, total, most)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_step_on_a_gpu_is_measured_to_take(precision, checkpointing, tmp_path):
    from bimamba_lit import MambaLM

    sizes = config(d_model=768, n_layer=6, headdim=64, d_state=128)
    MambaLM(sizes).save_pretrained(tmp_path / "teacher")
    modules = [student(str(tmp_path / "teacher"), activation_checkpointing=checkpointing) for _ in range(2)]
    found = estimated(modules[0], gpu=True, context=1024, precision=precision)
    most = measured(modules[1], tmp_path, gpu=True, context=1024, precision=precision)
    print(found.total / most, most, found)
    assert abs(found.total - most) <= 0.10 * most, (found, most)
