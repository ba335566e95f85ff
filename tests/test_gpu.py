"""What a GPU must do: ops within their bounds, a teacher and its binary student trained in mixed precision."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from bimamba_lit import MambaConfig
from bimamba_lit.bench.ops_accuracy import ops_accuracy
from bimamba_lit.binarize import FBI, pack_
from bimamba_lit.callbacks import BitFlips, NonFiniteGuard, RandomState, Throughput, WeightScales
from bimamba_lit.models.generate import generate
from bimamba_lit.training import AdamW, Distill, Pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the driver's and Lightning's words differ from machine to machine
]
VOCABULARY = 32


def test_ops_on_a_gpu_are_within_their_bound_of_the_float64_definitions():
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = ops_accuracy(device="cuda")
    assert all(error <= 1e-4 for _, error in rows), rows


def batches():
    """Return sequences that count up, so that there is something to learn."""
    ids = (torch.arange(65)[None] + torch.arange(8)[:, None]) % VOCABULARY
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "label_bytes": torch.ones_like(ids[:, 1:])}
    return DataLoader([batch] * 30, batch_size=None)


def fit(module, folder, *callbacks, **settings):
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[NonFiniteGuard(), Throughput(10), RandomState(), *callbacks],
        **settings,
    )
    trainer.fit(module, batches(), batches())
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return trainer, path


def test_a_teacher_and_its_binary_student_train_on_a_gpu(tmp_path):
    optimizer = AdamW(lr=3e-3, min_lr=3e-4, warmup_steps=3)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=VOCABULARY, headdim=16, d_state=16)
    teacher = Pretrain(config, optimizer)
    _, path = fit(teacher, tmp_path)
    student = Distill(str(path), FBI, optimizer=optimizer)
    trainer, _ = fit(student, tmp_path, BitFlips(10), WeightScales(10))
    assert 0 < float(trainer.callback_metrics["flips/rate"]) < 1
    assert student.lm.backbone.layers[0].mixer.in_proj.latent.dtype == torch.float32
    assert teacher.evaluated["bits_per_byte"] < 2 and student.evaluated["agreement"] > 0.5
    lm = student.lm.cuda()
    prompt = torch.arange(16, device="cuda")[None]
    tokens = generate(lm, prompt, 16, temperature=0)
    assert torch.equal(generate(pack_(lm), prompt, 16, temperature=0), tokens)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_in_deterministic_mode_the_same_run_twice_gives_the_same_weights(mixer, tmp_path):
    optimizer = AdamW(lr=3e-3, min_lr=3e-4, warmup_steps=3)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=VOCABULARY, headdim=16, d_state=16, mixer=mixer)

    def weights():
        pl.seed_everything(0)
        teacher = Pretrain(config, optimizer)
        _, path = fit(teacher, tmp_path, deterministic=True)
        student = Distill(str(path), FBI, optimizer=optimizer)
        fit(student, tmp_path, deterministic=True)
        return {**teacher.lm.state_dict(), **{f"student.{k}": v for k, v in student.lm.state_dict().items()}}

    try:
        first, second = weights(), weights()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first | second)
