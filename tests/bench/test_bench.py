"""The benchmark's accuracy table holds the figures that the README claims; times are printed, never tested."""

import pytest
import torch

from bimamba_lit.bench import models, ops_accuracy, speed
from bimamba_lit.cli import main


def test_ops_are_within_their_bound_of_the_float64_definitions():
    rows = ops_accuracy.ops_accuracy()
    assert {name.split(":")[0].split()[0] for name, _ in rows} >= {
        "ssd",
        "causal_conv1d",
        "binary_linear",
        "distillation_loss",
    }
    assert all(error <= 1e-4 for _, error in rows), rows


def test_other_forms_of_a_model_are_within_their_bounds():
    rows = dict(models.model_accuracy())
    assert rows.pop("step by step against forward") <= 1e-4
    assert rows.pop("prefill in two pieces against forward") <= 1e-4
    assert len(rows) == 3 and all(error <= 1e-5 for error in rows.values()), rows


def test_the_speed_table_is_printed_beside_the_peer(monkeypatch, capsys):
    pytest.importorskip("transformers")
    for name, value in {"WIDTH": 64, "LAYERS": 1, "VOCABULARY": 32, "LENGTH": 16, "STATE": 8, "REPEATS": 1}.items():
        monkeypatch.setattr(speed, name, value)
    main(["bench", "cpu", "--threads", str(torch.get_num_threads())])
    out = capsys.readouterr().out
    assert "| training step, fp32: bimamba-lit | " in out and "| training step, bf16-mixed: transformers | " in out
