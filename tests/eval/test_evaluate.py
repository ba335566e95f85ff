import json
import lzma
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_, pack_
from bimamba_lit.data.joined import Joined
from bimamba_lit.data.rows import FileRows
from bimamba_lit.data.source import Source
from bimamba_lit.data.sources import Part, Span
from bimamba_lit.data.tokenizer import ByteTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.eval.evaluate import Evaluation, evaluate, write_evaluation
from bimamba_lit.eval.text import TextSettings, measure_text
from bimamba_lit.export.safetensors import export_safetensors

BYTES = ByteTokenizer()
TEXT = "Ways of saying the same thing,\nand of saying another: été, 中文.\n\nA line more.\n" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    torch.manual_seed(3)
    config = MambaConfig(d_model=32, n_layer=2, headdim=16, d_state=16, chunk_size=16, vocab_size=257)
    return binarize_(MambaLM(config), FBI).eval()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_bits_per_byte_is_what_validate_and_test_say(tiny, bimamba, tmp_path):
    out = tmp_path / "figures" / "out.json"
    args = ["evaluate", "--ckpt", tiny.teacher, "--text", tiny.text, "--context=32", "--max_tokens=400", "--out", out]
    answer = bimamba(*args, "--batch_size=3")
    assert answer.code == 0, answer.err
    assert "text.txt" in answer.out and "bits/byte" in answer.out
    (figures,) = json.loads(out.read_text())["text"]
    summary = json.loads((tiny.teacher / "summary.json").read_text())
    assert figures["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(summary["perplexity"], rel=1e-6)
    assert figures["sha256"] == summary["eval_data"]["sha256"]
    assert (figures["tokens"], figures["bytes"], figures["documents"]) == (400, 400, 1)

    test = ["test", "-c", tiny.teacher_recipe, f"--data.test={tiny.text}", "--data.stride=5"]
    test += [f"--trainer.default_root_dir={tmp_path / 'tested'}"]
    tested = bimamba(*test, "--ckpt_path", tiny.teacher / "checkpoints" / "last.ckpt")
    assert tested.code == 0, tested.err
    assert (figures["context"], figures["stride"]) == (32, 32)
    assert bimamba(*args, "--stride=5").code == 0
    (figures,) = json.loads(out.read_text())["text"]
    assert (figures["context"], figures["stride"]) == (32, 5)
    assert figures["bits_per_byte"] != pytest.approx(summary["bits_per_byte"], rel=1e-6)
    assert f"test: {figures['bits_per_byte']:.3f} bits per byte, perplexity {figures['perplexity']:.1f}" in tested.out


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_papers_perplexity_matches_a_plain_one(lm, text, batch_size):
    figures = measure_text(lm, BYTES, Source(str(text)), TextSettings(context=48, batch_size=batch_size))
    ids = torch.tensor(BYTES.encode(TEXT))
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)
    assert len(ids) % 48 and figures.windows == len(windows)
    losses = [F.cross_entropy(lm(window[None]).logits[0, :-1].double(), window[1:]) for window in windows]
    assert figures.joined_perplexity == pytest.approx(math.exp(sum(map(float, losses)) / len(losses)), rel=1e-5)


def test_packed_and_compressed_change_nothing(lm, text, tmp_path):
    lm.save_pretrained(tmp_path / "latent", tokenizer=BYTES.to_json())
    pack_(MambaLM.from_pretrained(tmp_path / "latent")).save_pretrained(tmp_path / "packed", BYTES.to_json())
    compressed = tmp_path / "text.txt.xz"
    compressed.write_bytes(lzma.compress(text.read_bytes()))
    found = [
        evaluate(tmp_path / name, [Source(str(path))], TextSettings(context=64), device="cpu")
        for name, path in (("latent", text), ("packed", compressed))
    ]
    latent, packed = (evaluation.text[0] for evaluation in found)
    assert latent.sha256 == packed.sha256
    assert latent.bits_per_byte == pytest.approx(packed.bits_per_byte, rel=1e-5)
    assert latent.joined_perplexity == pytest.approx(packed.joined_perplexity, rel=1e-5)
    assert found[0].true_bits == found[1].true_bits and found[0].params == found[1].params

    export_safetensors(lm, tmp_path / "int8", BYTES.to_json(), embedding="int8")
    small = evaluate(tmp_path / "int8", [Source(str(text))], TextSettings(context=64), device="cpu")
    assert small.true_bits < found[0].true_bits
    assert small.text[0].bits_per_byte == pytest.approx(latent.bits_per_byte, abs=0.02)


def joined(parts: list[Part], lines: bool = False, document_end: str | None = None) -> str:
    return "".join(text for text, _ in Joined(tuple(parts), lines).texts(document_end))


def test_documents_are_joined_by_blank_lines(text, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ("one", "", "two\n", "three")))
    marked = tmp_path / "marked.txt"
    marked.write_text("a\nb\n<end>\nc\n<end>\n")
    assert joined([FileRows(rows)]) == "one\n\ntwo\n\n\nthree"
    assert joined([Span(marked)], document_end="<end>") == "a\nb\n\n\nc\n"
    assert joined([Span(text), FileRows(rows)]) == f"{TEXT}\n\none\n\ntwo\n\n\nthree"
    assert [ends for _, ends in Joined((Span(text),)).texts(None)].count(True) == 1


def test_lines_are_joined_as_the_rows_of_wikitext(tmp_path):
    raw = tmp_path / "wiki.raw"
    raw.write_text(" \n = Title = \n \n Words <unk> .\n" * 3000)
    rows = [f"{line}\n" if line.strip() else "" for line in raw.read_text().split("\n")[:-1]]
    assert joined([Span(raw)], lines=True) == "\n\n".join(rows)


def test_what_is_not_finite_is_written_as_a_word(tmp_path):
    evaluation = Evaluation("m", 1, 0, 16, [], [], math.nan, None)
    write_evaluation(evaluation, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["mean_accuracy"] == "nan"


def test_bad_input_is_told_in_a_sentence(tiny, bimamba, tmp_path):
    MambaLM(MambaConfig(d_model=32, n_layer=1, headdim=16, vocab_size=257)).save_pretrained(tmp_path / "mute")
    MambaLM(MambaConfig(d_model=32, n_layer=1, headdim=16, vocab_size=99)).save_pretrained(tmp_path / "narrow")
    run = ["--ckpt", tiny.teacher]
    for args, sentence in (
        ([*run], "there is nothing to evaluate on: give --text, --tasks or both"),
        ([*run, "--text", tmp_path / "textt.txt"], "--text: .*textt.txt' is not a file or folder"),
        ([*run, "--text", tiny.text], r"text.txt has 1720 tokens, and a window takes 2048"),
        ([*run, "--text", tiny.text, "--context=8", "--stride=9"], "--stride: 9 is more than the context of 8"),
        ([*run, "--text", tiny.text, "--context=1"], "--context: 1 is out of range, the least is 2"),
        ([*run, "--text", tiny.text, "--device=gpuu"], "--device: 'gpuu' cannot be used"),
        (["--ckpt", tmp_path / "mute", "--text", tiny.text], "has no tokenizer beside its weights.*--tokenizer"),
        (["--ckpt", tmp_path / "narrow", "--text", tiny.text, "--tokenizer=bytes"], "has 257 tokens and .* knows 99"),
        (["--ckpt", tmp_path / "none", "--text", tiny.text], "there is no file or folder"),
        ([*run, "--text", tmp_path / "not_read", "--out", tmp_path], "--out: .* is a folder, and the figures are one"),
        ([*run, "--text", tiny.text, "--tokenizer=bpe:9"], "bpe:9' is trained with a model, .*: give bytes"),
    ):
        answer = bimamba("evaluate", *args)
        assert answer.code == 1 and re.search(sentence, answer.err), answer
        assert answer.err.count("\n") <= 1 and "Traceback" not in answer.err
    with pytest.raises(UserError, match="cannot write"):
        write_evaluation(Evaluation("m", 1, 0, 16, [], [], None, None), tiny.text / "out.json")
