"""A folder to share holds the model and what was measured of it."""

import json

import pytest

from bimamba_lit.report.share import model_card


def test_a_run_is_shared(tiny, bimamba, tmp_path):
    out = tmp_path / "shared"
    answer = bimamba("share", tiny.teacher, "--out", out)
    assert answer.code == 0 and answer.out == f"Written: {out}\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    card, summary = (out / "README.md").read_text(), json.loads((tiny.teacher / "summary.json").read_text())
    assert card.startswith("---\n") and f"# {summary['name']}\n" in card and "None" not in card
    for figure in (f"{summary['bits_per_byte']:.3f}", f"{summary['params']:,}", summary["eval_data"]["sha256"][:12]):
        assert figure in card
    again = bimamba("generate", "--ckpt", out, "--prompt", "The ", "--max_new_tokens", 3)
    assert again.code == 0 and again.out.startswith("The ")


def test_what_is_not_shared(tiny, bimamba, tmp_path):
    (tmp_path / "file").write_text("old")
    for run, out, sentence in (
        (tmp_path, tmp_path / "shared", "has no summary.json"),
        (tiny.teacher, tmp_path / "file", "is a file, and what is shared is a folder"),
        (tiny.teacher, tiny.teacher, "is the run's own folder"),
    ):
        answer = bimamba("share", run, "--out", out)
        assert answer.code == 1 and sentence in answer.err, answer
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("scheme", "foreign"), [("fp", ""), ("FBI", ""), ("ptb.ARBRC", ""), ("FBI+Mine", "Mine"), ("ptb.Mine", "ptb.Mine")]
)
def test_the_card_says_what_a_scheme_of_ones_own_needs(summary, tmp_path, scheme, foreign):
    card = model_card(summary(scheme=scheme), tmp_path)
    assert ("--import MODULE" in card) == bool(foreign)
    assert not foreign or f"defines {foreign} first" in card
