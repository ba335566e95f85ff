import json

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binary_layers
from bimamba_lit.data import TextDataModule
from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import load_lm
from bimamba_lit.training import AdamW, Distill


def path_of(tiny) -> str:
    return str(tiny.teacher / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def path(tiny):
    return path_of(tiny)


def built(path: str, **settings: object) -> Distill:
    module = Distill(path, settings.pop("binarizer", FBI), **settings)
    module.configure_model()
    module.log_loss = lambda loss, **_: loss
    return module


@pytest.fixture(scope="module")
def batch():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 13), generator=draw)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return {"input_ids": ids, "labels": labels}


def test_a_student_starts_from_the_teacher(path):
    module, teacher = built(path), load_lm(path)
    for name, parameter in module.lm.named_parameters():
        if "in_proj" not in name and "out_proj" not in name:
            assert torch.equal(parameter, teacher.get_parameter(name)), name
    assert len(list(binary_layers(module.lm))) == 2
    plain = built(path, binarizer=None)
    assert not list(binary_layers(plain.lm))
    ids = torch.arange(9)[None]
    assert torch.equal(plain.lm(ids).logits, teacher(ids).logits)
    assert {id(one) for one in plain.lm.parameters()}.isdisjoint({id(one) for one in plain.teacher.parameters()})


def test_a_student_of_its_own_shape_starts_at_random(path):
    module = built(path, student=MambaConfig(d_model=16, n_layer=2, headdim=8, d_state=8, chunk_size=8))
    assert (module.lm.config.d_model, module.lm.config.vocab_size) == (16, module.teacher.config.vocab_size)
    assert len(list(binary_layers(module.lm))) == 4


def test_a_student_of_a_teacher_in_half_precision_is_in_fp32(path, batch, monkeypatch):
    half = load_lm(path).to(torch.bfloat16).requires_grad_(False)
    monkeypatch.setattr("bimamba_lit.training.distill.load_teacher", lambda *_: half)
    module = built(path)
    assert module.teacher is half and half.head_weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in module.lm.parameters()} == {torch.float32}
    assert torch.isfinite(module.training_step(batch))


def test_documents_in_a_row_do_not_see_each_other(path, batch):
    ids = batch["input_ids"]
    documents = torch.tensor([[0] * 6 + [1] * 7] * 2, dtype=torch.int32)
    apart = {"input_ids": ids, "seq_idx": documents}
    module = built(path)
    for output in (module.student_output, module.teacher_output):
        with torch.no_grad():
            together, _ = output(apart)
            second, _ = output({"input_ids": ids[:, 6:]})
            joined, _ = output({"input_ids": ids})
        assert torch.allclose(together[:, 6:], second, atol=1e-5)
        assert not torch.allclose(joined[:, 6:], second, atol=1e-5)


class OtherTeacher:
    """What any teacher looks like that is no Mamba model."""

    def __init__(self, vocab_size: int) -> None:
        self.head_weight = torch.randn(vocab_size, 6)
        self.config = MambaConfig(d_model=64, n_layer=1, vocab_size=vocab_size)
        self.device = torch.device("cpu")

    def backbone(self, input_ids, seq_idx=None):
        return self.head_weight[input_ids]


def test_a_teacher_of_another_kind_teaches_a_student_of_its_own_shape(path, batch, monkeypatch):
    monkeypatch.setattr("bimamba_lit.training.distill.load_teacher", lambda *_: OtherTeacher(256))
    with pytest.raises(UserError, match="no student can start from its weights"):
        built(path)
    module = built(path, student=MambaConfig(d_model=16, n_layer=1, headdim=8, d_state=8, chunk_size=8))
    module.training_step(batch).backward()
    assert module.lm.backbone.layers[0].mixer.in_proj.latent.grad.abs().sum() > 0


def test_the_teacher_is_frozen_and_nobodys_child(path):
    module = built(path)
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert not module.teacher.training
    inside = {id(parameter) for parameter in module.parameters()}
    assert inside.isdisjoint({id(parameter) for parameter in module.teacher.parameters()})
    assert all(name.startswith(("lm.", "metrics.")) for name in module.state_dict())


def plain_loss(kind: str, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float):
    """The definitions, a position at a time, in float64."""
    losses = []
    for ours, theirs, label in zip(student.double(), teacher.double(), labels.tolist(), strict=True):
        if label == -100:
            continue
        log_s, log_t = (F.log_softmax(logits / temperature, 0) for logits in (ours, theirs))
        soft = {
            "soft_ce": -(log_t.exp() * log_s).sum(),
            "forward_kl": (log_t.exp() * (log_t - log_s)).sum(),
            "reverse_kl": (log_s.exp() * (log_s - log_t)).sum(),
        }[kind]
        losses.append((soft * temperature**2, -F.log_softmax(ours, 0)[label]))
    return torch.tensor(losses, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("kind", ["soft_ce", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("temperature", "hard_share"), [(1.0, 0.0), (2.5, 0.3), (1.0, 1.0)])
def test_the_loss_is_what_it_says(path, batch, kind, temperature, hard_share):
    module = built(path, divergence=kind, temperature=temperature, hard_share=hard_share)
    with torch.no_grad():
        student, teacher = (lm(batch["input_ids"]).logits.flatten(0, 1) for lm in (module.lm, module.teacher))
    soft, hard = plain_loss(kind, student, teacher, batch["labels"].flatten(), temperature)
    loss = module.training_step(batch)
    assert float(loss.detach()) == pytest.approx(float((1 - hard_share) * soft + hard_share * hard), rel=1e-4)
    loss.backward()
    assert module.lm.backbone.layers[0].mixer.in_proj.latent.grad.abs().sum() > 0


@pytest.fixture
def large(monkeypatch):
    """A teacher of three blocks in the place of the tiny one."""
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=48, n_layer=3, vocab_size=256, headdim=16, d_state=8, chunk_size=8))
    monkeypatch.setattr("bimamba_lit.training.distill.load_teacher", lambda *_: lm.requires_grad_(False))
    return lm


@pytest.mark.parametrize("saving", [False, True])
def test_hidden_states_are_matched_block_by_block(path, batch, saving, large):
    module = built(path, hidden_weight=0.7, activation_checkpointing=saving)
    parts = {}
    module.log_loss = lambda loss, **values: parts.update(values) or loss
    labels = batch["labels"].clone()
    labels[0, :4] = -100
    loss = module.training_step(batch | {"labels": labels})
    shares = []
    with torch.no_grad():
        streams = []
        for lm in (module.lm, module.teacher):
            x, after = lm.backbone.embedding(batch["input_ids"]), []
            for block in lm.backbone.layers:
                x = block(x)
                after.append(x.double()[labels != -100])
            streams.append(after)
        for ours, theirs in zip(*streams, strict=True):
            shares.append((((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)).mean())
        plain = built(path).training_step(batch | {"labels": labels})
    hidden = float(sum(shares) / 3)
    assert hidden > 1e-3 and float(parts["hidden"]) == pytest.approx(hidden, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(plain) + 0.7 * hidden, rel=1e-5)
    loss.backward()
    assert module.lm.backbone.layers[0].mixer.in_proj.latent.grad.abs().sum() > 0
    assert not any(parameter.grad is not None for parameter in module.teacher.parameters())


def test_a_student_equal_to_its_teacher_has_no_hidden_loss(path, batch):
    module = built(path, binarizer=None, hidden_weight=1.0)
    parts = {}
    module.log_loss = lambda loss, **values: parts.update(values) or loss
    module.training_step(batch)
    assert float(parts["hidden"]) < 1e-12


def test_hidden_states_of_other_shapes_are_refused(path, monkeypatch):
    other = MambaConfig(d_model=16, n_layer=2, headdim=8, d_state=8, chunk_size=8)
    with pytest.raises(UserError, match="2 blocks of width 16 and the teacher 1 of width 32"):
        built(path, student=other, hidden_weight=1.0)
    monkeypatch.setattr("bimamba_lit.training.distill.load_teacher", lambda *_: OtherTeacher(256))
    with pytest.raises(UserError, match="no Mamba model"):
        built(path, student=other, hidden_weight=1.0)


@pytest.mark.parametrize("wrong", [{"hidden_weight": -1.0}, {"hard_share": 1.5}, {"temperature": 0.0}])
def test_a_loss_that_cannot_be_is_refused_before_anything_is_loaded(path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"model.{name}: {value} is out of range, it must be"):
        Distill(path, FBI, **wrong)


def test_a_wider_and_deeper_teacher_teaches(path, batch, large):
    small = MambaConfig(d_model=16, n_layer=1, headdim=8, d_state=8, chunk_size=8)
    module = built(path, student=small, divergence="reverse_kl", hard_share=0.1)
    module.training_step(batch).backward()
    assert module.lm.backbone.layers[0].mixer.in_proj.latent.grad.abs().sum() > 0


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(path, tiny, tmp_path):
    pl.seed_everything(0, verbose=False)
    data = TextDataModule(str(tiny.text), str(tiny.text), context=32, batch_size=8, cache_dir=str(tmp_path))
    student = MambaConfig(d_model=32, n_layer=1, headdim=16, d_state=16, chunk_size=16)
    optimizer = AdamW(lr=1e-2, min_lr=0.0, warmup_steps=2, latent_lr=2e-2)
    module = Distill(path, FBI, student, hard_share=0.5, hidden_weight=0.1, optimizer=optimizer)
    losses, logged = [], {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            for name, value in trainer.logged_metrics.items():
                logged.setdefault(name, []).append(float(value))

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=30,
        logger=False,
        callbacks=[Watch()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert logged.keys() == {"train/loss", "train/hidden", "train/lr", "train/lr/latent"}
    assert logged["train/lr"][2] == pytest.approx(1e-2) and logged["train/lr"][29] == 0.0
    assert logged["train/lr/latent"] == pytest.approx([2 * rate for rate in logged["train/lr"]])
    fresh = load_lm(path)
    assert all(torch.equal(fresh.get_parameter(name), one) for name, one in module.teacher.named_parameters())
    (optimizer_,) = trainer.optimizers
    trained = {id(one) for group in optimizer_.param_groups for one in group["params"]}
    assert trained == {id(one) for one in module.lm.parameters()}


def test_a_run_with_rows_in_full_precision(tiny, bimamba, tmp_path):
    run, callbacks = tmp_path / "run", []
    for name in ("BitFlips", "WeightScales"):
        callbacks += [f"--trainer.callbacks+=bimamba_lit.callbacks.{name}", "--trainer.callbacks.every_n_steps=2"]
    command = ["fit", "-c", tiny.distill_recipe, f"--trainer.default_root_dir={run}", *callbacks]
    keep = ["--model.keep_rows={in_proj: [B, dt]}", "--model.targets=[in_proj, out_proj, '!*.9.*']"]
    answer = bimamba(*command, "--trainer.max_steps=4", "--model.deploy=[gguf]", keep[0])
    assert answer.code == 1 and "rows in full precision" in answer.err.replace("\n", " "), answer
    answer = bimamba(*command, "--trainer.max_steps=4", *keep)
    assert answer.code == 1 and "'*.9.*' matches no Linear layer" in answer.err, answer
    answer = bimamba(*command, "--trainer.max_steps=4", "--model.deploy=[torchscript]", keep[0])
    assert answer.code == 0, answer
    metrics = (run / "metrics.csv").read_text()
    for name in ("flips/rate", "scales"):
        assert f"{name}/backbone.layers.0.mixer.in_proj.binary" in metrics
    lm = load_lm(run / "checkpoints" / "last.ckpt")
    layer = lm.backbone.layers[0].mixer.in_proj
    assert layer.names == ["B", "dt"] and layer.kept.shape == (16 + 4, 32)
    start = load_lm(path_of(tiny)).backbone.layers[0].mixer.in_proj.weight
    rows = torch.cat([start[128:144], start[160:]])
    assert not torch.equal(layer.kept, rows) and torch.allclose(layer.kept, rows, atol=0.05), (
        "trained from the teacher's"
    )
    found = json.loads((run / "summary.json").read_text())
    weights = 164 * 32 + 32 * 64
    bits = (164 - 20) * 32 + 32 * 64 + 16 * (2 * 32 + 2 * 64) + 16 * 20 * 32  # signs, scales and shifts, rows
    assert found["binarized_params"] == weights
    assert sum(found["storage"].values()) - found["storage"]["full_precision"] == bits
    answer = bimamba("export", "--ckpt", run, "--format", "safetensors", "--out", tmp_path / "out")
    assert answer.code == 0, answer
    packed = load_lm(tmp_path / "out").backbone.layers[0].mixer.in_proj
    torch.testing.assert_close(packed.weight, layer.weight, rtol=1e-3, atol=1e-4)


def test_a_run_with_two_signs_for_some_inputs(tiny, bimamba, tmp_path):
    run, callbacks = tmp_path / "run", []
    settings = {"AnnealedGradient": ["end_step=4"], "Progressive": ["by=tanh", "end_step=4"]}
    for name in ("BitFlips", "WeightScales", "AnnealedGradient", "Progressive"):
        callbacks += [f"--trainer.callbacks+=bimamba_lit.callbacks.{name}"]
        callbacks += [f"--trainer.callbacks.{setting}" for setting in settings.get(name, ["every_n_steps=2"])]
    scheme = ["--model.binarizer=bimamba_lit.binarize.TwoSided", "--model.binarizer.reach=1"]
    scheme += ["--model.binarizer.straight_through=tanh", "--model.double_inputs={in_proj: 0.15, out_proj: 0.1}"]
    command = ["fit", "-c", tiny.distill_recipe, f"--trainer.default_root_dir={run}", *scheme, *callbacks]
    answer = bimamba(*command, "--trainer.max_steps=6", "--model.deploy=[gguf]")
    assert answer.code == 1 and "a second sign for 32 of its inputs" in answer.err.replace("\n", " "), answer
    answer = bimamba(*command, "--trainer.max_steps=6", "--model.deploy=[torchscript]")
    assert answer.code == 0, answer
    assert "flips/rate/backbone.layers.0.mixer.in_proj.binary" in (run / "metrics.csv").read_text()
    found = json.loads((run / "summary.json").read_text())
    signs, scales, choice = 164 * 64 + 32 * 96, 16 * (164 + 64 + 32 + 96), 8 + 8
    assert found["binarized_params"] == 164 * 32 + 32 * 64
    assert found["storage"]["signs"] == signs and found["storage"]["doubled"] == choice
    assert sum(found["storage"].values()) - found["storage"]["full_precision"] == signs + scales + choice
    layer = load_lm(run / "checkpoints" / "last.ckpt").backbone.layers[0].mixer.in_proj
    assert layer.binary.unfinished is None and len(layer.doubled) == 32
    answer = bimamba("export", "--ckpt", run, "--format", "safetensors", "--out", tmp_path / "out")
    assert answer.code == 0, answer
    packed = load_lm(tmp_path / "out").backbone.layers[0].mixer.in_proj
    torch.testing.assert_close(packed.weight, layer.weight, rtol=2e-3, atol=1e-3)


def test_scale_names_tell_whether_a_model_was_trained():
    from bimamba_lit.binarize import Sign, binarize_
    from bimamba_lit.training.language import scheme_name

    lm = MambaLM(MambaConfig(vocab_size=11, d_model=16, n_layer=1, headdim=8, d_state=8))
    assert scheme_name(lm, trained=True) == scheme_name(lm, trained=False) == "fp"
    binarize_(lm, Sign, ["in_proj"])
    binarize_(lm, FBI, ["out_proj"])
    assert scheme_name(lm, trained=True) == "FBI+Sign"
    assert scheme_name(lm, trained=False) == "ptb.FBI+ptb.Sign"


def test_a_checkpoint_loads_as_any_lightning_module(tiny, path, tmp_path):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **options)
    module = Distill(path, FBI, optimizer=AdamW(warmup_steps=1))
    data = TextDataModule(str(tiny.text), str(tiny.text), context=32, batch_size=8, cache_dir=str(tmp_path))
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    settings = {"teacher": path, "binarizer": FBI, "weights_only": True}
    loaded = Distill.load_from_checkpoint(tmp_path / "student.ckpt", **settings)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.eval().lm(ids).logits, module.eval().lm(ids).logits)
