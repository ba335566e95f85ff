"""A folder to share holds the model and what was measured of it."""

import json

import pytest

from bimamba_lit import MambaLM
from bimamba_lit.models.count import true_bits
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


def test_a_card_tells_the_size_of_the_embedding_that_is_shared(tiny, bimamba, tmp_path):
    said = {}
    for embedding in (None, "int8", "int4"):
        out = tmp_path / str(embedding)
        answer = bimamba("share", tiny.teacher, "--out", out, *([f"--embedding={embedding}"] if embedding else []))
        assert answer.code == 0, answer
        card = (out / "README.md").read_text()
        said[embedding] = card
        mib = true_bits(MambaLM.from_pretrained(out)) / 8 / 2**20
        assert f"| true size | {mib:.2f} MiB, {f'embedding and head in {embedding}, ' if embedding else ''}all" in card
        assert (f"before its embedding was rounded to {embedding}" in card) == (embedding is not None)
    assert len({card.partition("| true size | ")[2][:4] for card in said.values()}) > 1


def test_a_card_tells_the_bits_of_what_is_binarized(summary, tmp_path):
    half = 750_000
    bits = {"signs": 1_500_000, "in_scale": half, "full_precision": 99}
    for scheme, extra, words in (
        ("FBI", {}, ["1-bit weights (FBI)", "75.0% of them binarized: 1.50 bits each, scales counted", "1-bit, "]),
        (
            "FBI",
            {"doubled": 16, "in_scale": 16},
            ["1-bit weights", ": 1.00 bits each, scales and second signs counted"],
        ),
        ("ptb.GPTQ", {"signs": 6_000_000}, ["weights of 4.5 bits (ptb.GPTQ)", "tags: [mamba, bimamba-lit]"]),
    ):
        card = model_card(summary(scheme=scheme, storage=bits | extra), tmp_path)
        assert all(word in card for word in words), card
    unknown, dense = summary(storage=None), summary(scheme="fp", binarized_params=0, storage={"full_precision": 9})
    assert "75.0% of them binarized |" in model_card(unknown, tmp_path)
    assert "in full precision" in model_card(dense, tmp_path) and "2,000,000 |" in model_card(dense, tmp_path)


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
