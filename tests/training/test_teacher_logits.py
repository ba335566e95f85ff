"""A student that learns from distributions on disk learns what it would from the teacher itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from bimamba_lit import ops
from bimamba_lit.distill import store_teacher
from bimamba_lit.distill.stored_teacher import MANIFEST, StoredTeacher
from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import load_lm

VOCABULARY = 257


@pytest.fixture(scope="module")
def written(tiny, bimamba, tmp_path_factory):
    """All probabilities of the tiny teacher over its text, a few sequences a file, and what was printed."""
    out = tmp_path_factory.mktemp("logits") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_teacher, "SHARD_BYTES", 7 * 32 * store_teacher.bytes_a_token(VOCABULARY, VOCABULARY))
        answer = bimamba("teacher-logits", "-c", tiny.distill_recipe, "--out", out, f"--top_k={VOCABULARY}")
    assert answer.code == 0, answer
    return out, answer.out


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """The distillation recipe with weights to start from, so that the teacher can be only its logits."""
    settings = yaml.safe_load(tiny.distill_recipe.read_text())
    settings["model"]["init_args"]["student"] = str(tiny.teacher)
    file = tmp_path_factory.mktemp("recipes") / "student.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 5, 12])
def test_what_is_kept_is_the_likeliest_at_a_temperature_and_the_rest(top_k, temperature, monkeypatch):
    monkeypatch.setattr(store_teacher, "_CHUNK_TOKENS", 4)
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9, 6, generator=draw), torch.randn(12, 6, generator=draw)
    ids, log_probs = store_teacher.likeliest(hidden, head, top_k, temperature)
    for row, own_ids, own in zip(hidden, ids, log_probs.exp(), strict=True):
        powers = [float((row @ weights / temperature).exp()) for weights in head]
        shares = [power / sum(powers) for power in powers]
        assert own_ids.tolist() == sorted(sorted(range(12), key=lambda i: -shares[i])[:top_k])
        assert own[:-1].tolist() == pytest.approx([shares[i] for i in own_ids], rel=1e-5)
        assert float(own[-1]) == pytest.approx(1 - sum(shares[i] for i in own_ids), abs=1e-6)


def test_the_cost_is_told_before_and_after(written):
    out, printed = written
    size = sum(file.stat().st_size for file in out.glob("*.arrow"))
    manifest = StoredTeacher(out).manifest
    tokens = manifest.sequences * 32
    assert manifest.shards > 3 and len(list(out.iterdir())) == manifest.shards + 1
    assert f"top 257 of 257: about {round(size / tokens, -2):.0f}"[:-2] in printed and "are free" in printed
    assert f"({257 * 2 + 258 * 2} before compression)" in printed
    assert f"{manifest.sequences} sequences of 32 tokens" in printed


def test_all_tokens_give_the_online_loss_to_rounding(tiny, written, bimamba, recipe, tmp_path):
    out, _ = written
    for name, teacher in (("online", tiny.teacher), ("stored", out)):
        answer = bimamba(
            "fit", "-c", recipe, f"--model.teacher={teacher}", f"--trainer.default_root_dir={tmp_path / name}"
        )
        assert answer.code == 0, answer
    online, stored = losses(tmp_path / "online"), losses(tmp_path / "stored")
    assert len(online) == len(stored) == 10
    assert stored[0] == pytest.approx(online[0], rel=1e-6)
    assert stored == pytest.approx(online, rel=2e-5)
    summary = json.loads((tmp_path / "stored" / "summary.json").read_text())
    assert summary["agreement"] is None and Path(summary["teacher"]).resolve() == tiny.teacher


def test_fewer_tokens_give_a_loss_that_is_a_little_lower(tiny, written):
    stored, teacher = StoredTeacher(written[0]), load_lm(tiny.teacher / "checkpoints" / "last.ckpt")
    ids, log_probs = stored.distributions([3, 0])
    assert ids.dtype == torch.int32 and log_probs.dtype == torch.float16 and log_probs.isneginf().sum() == 2 * 32
    hidden = torch.randn(2, 32, 16)
    head = torch.randn(VOCABULARY, 16)
    text = torch.frombuffer(bytearray(tiny.text.read_bytes()), dtype=torch.uint8).long()
    inputs = torch.stack([text[3 * 32 : 4 * 32], text[:32]])
    with torch.no_grad():
        theirs = teacher.backbone(inputs), teacher.head_weight
    online = ops.distillation_loss(hidden, head, *theirs, divergence="forward_kl")
    every = ops.topk_distillation_loss(hidden, head, ids, log_probs, divergence="forward_kl")
    assert float(every) == pytest.approx(float(online), abs=1e-4)
    few_ids, few = store_teacher.likeliest(theirs[0].flatten(0, 1), theirs[1], 8, 1.0)
    assert (few_ids.diff() > 0).all() and torch.allclose(few.exp().sum(-1), torch.ones(64))
    few_ids, few = few_ids.view(2, 32, 8), few.view(2, 32, 9)
    lower = ops.topk_distillation_loss(hidden, head, few_ids, few, divergence="forward_kl")
    assert 0.01 * online < lower < online


# From Python 3.12 on a fork beside other threads warns; the loader's workers only index an array.
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_shuffled_with_workers_and_resumed_it_is_the_same_run(written, bimamba, recipe, tmp_path):
    out, _ = written
    stored = [f"--model.teacher={out}", "--checkpoint.every_n_train_steps=1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs = [
        (whole, ["--data.workers=2"]),
        (stopped, ["--trainer.max_steps=4"]),
        (stopped, ["--ckpt_path=last"]),
    ]
    schedule = "--model.optimizer.total_steps=10"
    for folder, more in runs:
        answer = bimamba("fit", "-c", recipe, f"--trainer.default_root_dir={folder}", schedule, *stored, *more)
        # How many workers load is part of a configuration, and changes nothing.
        assert answer.code == 0, answer
    one, other = final(whole), final(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_and_started_again_it_ends_the_same(tiny, written, bimamba, tmp_path):
    out, _ = written
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shards = sorted(again.glob("*.arrow"))
    for shard in shards[1::2]:
        shard.unlink()
    left = again / ".shard-000001.arrow.xyz.partial"  # by a killed process
    left.write_bytes(b"cut off")
    answer = bimamba("teacher-logits", "-c", tiny.distill_recipe, "--out", again, f"--top_k={VOCABULARY}")
    assert answer.code == 1 and "another sequences_a_shard" in answer.err  # of another size in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_teacher, "SHARD_BYTES", 7 * 32 * store_teacher.bytes_a_token(VOCABULARY, VOCABULARY))
        answer = bimamba("teacher-logits", "-c", tiny.distill_recipe, "--out", again, f"--top_k={VOCABULARY}")
    assert answer.code == 0 and f"has {len(shards[::2])} of {len(shards)} shards: going on" in answer.out
    for shard in shards:
        assert shard.read_bytes() == (out / shard.name).read_bytes()
    assert not left.exists()


def test_processes_share_the_shards(tiny, written, bimamba, tmp_path, monkeypatch):
    """Another process holds a shard: this one writes all others, and a later one that."""
    monkeypatch.setattr(store_teacher, "SHARD_BYTES", 7 * 32 * store_teacher.bytes_a_token(VOCABULARY, VOCABULARY))
    command = ["teacher-logits", "-c", tiny.distill_recipe, "--out", tmp_path / "shared", f"--top_k={VOCABULARY}"]
    (tmp_path / "shared").mkdir()
    shutil.copy(written[0] / MANIFEST, tmp_path / "shared")
    with FileLock(tmp_path / "shared" / ".shard-000002.arrow.lock"):
        answer = bimamba(*command)
    assert answer.code == 0 and "shard-000002.arrow is being written by another process" in answer.out
    assert "train from it" not in answer.out
    with pytest.raises(UserError, match="lacks 1 of its"):
        StoredTeacher(tmp_path / "shared")
    assert "train from it" in bimamba(*command).out
    names = sorted(path.name for path in written[0].iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names


@pytest.mark.slow
def test_a_real_kill(tiny, written, tmp_path):
    out, _ = written
    again = tmp_path / "again"
    bytes_a_shard = 7 * 32 * store_teacher.bytes_a_token(VOCABULARY, VOCABULARY)
    script = (
        "import time\n"
        "from bimamba_lit.distill import store_teacher\n"
        f"store_teacher.SHARD_BYTES = {bytes_a_shard}\n"
        "write = store_teacher.write_shard\n"
        "store_teacher.write_shard = lambda *a: (time.sleep(0.2), write(*a))\n"
        "from bimamba_lit.cli import main\n"
        f"main(['teacher-logits', '-c', {str(tiny.distill_recipe)!r}, '--out', {str(again)!r}, '--top_k=257'])\n"
    )
    for _ in range(3):
        before = len(list(again.glob("*.arrow"))) if again.exists() else 0
        running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and len(list(again.glob("*.arrow"))) < before + 2:
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert len(list(again.glob("*.arrow"))) < len(list(out.glob("*.arrow")))
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for shard in out.glob("*.arrow"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()


def refused(bimamba, *args: object) -> str:
    answer = bimamba(*args)
    assert answer.code == 1 and "Traceback" not in answer.err, answer
    (sentence,) = [line for line in answer.err.splitlines() if line.startswith("bimamba: ")]
    return sentence


def test_what_does_not_fit_is_told(tiny, written, bimamba, recipe, tmp_path, monkeypatch):
    out, _ = written
    fit = ["fit", "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", f"--model.teacher={out}"]
    assert f"give the weights to start from, such as --model.student={tiny.teacher}" in refused(
        bimamba, *fit, "--model.student=teacher"
    )
    assert "context is 16 here and 32 there" in refused(bimamba, *fit, "--data.context=16")
    assert "temperature is 2.0, and" in refused(bimamba, *fit, "--model.temperature=2.0")
    assert "text and tokenizer (SHA-256) is" in refused(bimamba, *fit, "--data.train=offline", "--data.val=offline")
    assert "a streamed text has no numbered" in refused(bimamba, *fit, "--data.streaming=true")
    assert not (tmp_path / "run").exists()
    store = ["teacher-logits", "-c", tiny.distill_recipe]
    assert "holds a teacher's logits of another top_k" in refused(bimamba, *store, "--out", out, "--top_k=3")
    assert "out of range, it must be 1 to the 257" in refused(bimamba, *store, "--out", tmp_path, "--top_k=300")
    assert "is there already and holds no teacher's" in refused(bimamba, *store, "--out", tiny.folder)
    assert "must be Distill, whose teacher is asked, not Pretrain" in refused(
        bimamba, "teacher-logits", "-c", tiny.teacher_recipe, "--out", tmp_path / "o"
    )
    assert f"model.teacher: {out} holds logits already" in refused(
        bimamba, *store, "--out", tmp_path / "o", f"--model.teacher={out}"
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_teacher.shutil, "disk_usage", lambda _: usage(0, 0, 10_000))
    assert "the disk has 1e-05 GB left" in refused(bimamba, *store, "--out", tmp_path / "full")


def test_damage_is_told(written, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(written[0], folder)
    shard = folder / "shard-000001.arrow"
    whole = shard.read_bytes()
    for place in range(400, len(whole), len(whole) // 25):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        stored, right = StoredTeacher(folder), StoredTeacher(written[0])
        for sequence in range(7, 14):
            try:
                read = stored.distributions([sequence])
            except UserError as told:
                assert "shard-000001.arrow is missing, damaged or cut short" in str(told)
            else:
                assert all(torch.equal(a, b) for a, b in zip(read, right.distributions([sequence]), strict=True))
    shard.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="damaged or cut short at sequence 7"):
        StoredTeacher(folder).distributions([7])
    shard.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its \d+ shards, shard-000001.arrow first"):
        StoredTeacher(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for change in ({"version": 2}, {"top_k": 0}, {"top_k": "many"}, {"more": 1}, {"temperature": float("nan")}):
        (folder / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=r"teacher_logits\.json is"):
            StoredTeacher(folder)
