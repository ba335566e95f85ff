"""The benchmark's accuracy table holds the figures that the README claims; times are printed, never tested."""

from importlib.util import find_spec

import pytest
import torch

from bimamba_lit.bench import models, ops_accuracy, speed
from bimamba_lit.cli import main


def test_ops_are_within_their_bound_of_the_float64_definitions():
    rows = ops_accuracy.ops_accuracy()
    assert all(error <= 1e-4 for _, error in rows), rows


def test_other_forms_of_a_model_are_within_their_bounds():
    rows = models.model_accuracy()
    packed = [error for name, error in rows if name.startswith("packed")]
    assert len(packed) == 3 and all(error <= 1e-5 for error in packed), rows
    assert len(rows) == 3 + 2 * (4 if find_spec("transformers") else 2)
    assert all(error <= 1e-4 for _, error in rows), rows


def test_the_speed_table_is_printed_beside_the_peer(monkeypatch, capsys):
    pytest.importorskip("transformers")
    for name, value in {
        "WIDTH": 64,
        "LAYERS": 1,
        "VOCABULARY": 32,
        "LENGTH": 16,
        "STATE": 8,
        "DECODED": 2,
        "REPEATS": 1,
    }.items():
        monkeypatch.setattr(speed, name, value)
    main(["bench", "cpu", "--threads", str(torch.get_num_threads())])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| Mamba-")]
    assert len(lines) == 2 * len(speed.QUANTITIES)
    assert all(float(cell) > 0 for line in lines[:5] for cell in line.split("|")[2:6])


@pytest.mark.slow
def test_the_tokenizing_table_is_printed_beside_the_map(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A line of some words.\n" * 3000)
    main(["bench", "data", "--text", str(text)])
    lines = [line for line in capsys.readouterr().out.splitlines() if " MB |" in line and line.count(",") == 2]
    assert [line.split(",")[0] for line in lines] == ["| bimamba-lit", "| datasets map"] * 2
    assert all(float(line.split("|")[2]) >= 0 and float(line.split("|")[3]) > 0 for line in lines)
