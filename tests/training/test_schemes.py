"""Every new kind of scheme as a user trains it: fit, resume, compare, export."""

import json

import pytest


@pytest.fixture(scope="module")
def runs(bimamba, tiny, tmp_path_factory):
    """Each scheme trained for two steps: its run folder by its name."""
    folder = tmp_path_factory.mktemp("schemes")
    options = {"GroupScale": ["--model.binarizer.group_size=8"]}
    for scheme in ("TwoSided", "GroupScale", "OneBit", "ParetoQ", "Ternary", "TwoBit"):
        answer = bimamba(
            *("fit", "-c", tiny.distill_recipe, f"--model.binarizer={scheme}", *options.get(scheme, [])),
            *("--model.student=teacher", "--trainer.max_steps=2", f"--trainer.default_root_dir={folder / scheme}"),
        )
        assert answer.code == 0, answer
    return folder


def test_a_comparison_tells_the_true_bits_of_all(runs, bimamba):
    folders = sorted(runs.iterdir())
    answer = bimamba("compare", *folders, "--out", runs.parent / "schemes_report")
    assert answer.code == 0, answer
    summaries = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}
    assert all(summary["scheme"] == name for name, summary in summaries.items())
    bits = {name: summary["true_bits"] for name, summary in summaries.items()}
    assert bits["TwoSided"] == bits["OneBit"] < bits["Ternary"] < bits["TwoBit"]
    report = (runs.parent / "schemes_report" / "report.csv").read_text()
    assert all(name in report for name in summaries)


def test_it_exports_to_torchscript_or_is_refused_by_name(runs, bimamba):
    for scheme in ("GroupScale", "TwoBit"):
        file = runs.parent / f"{scheme}.pt"
        answer = bimamba("export", "--ckpt", runs / scheme, "--format", "torchscript", "--out", file)
        assert answer.code == 0, answer
        assert file.stat().st_size
    answer = bimamba("export", "--ckpt", runs / "OneBit", "--format", "torchscript", "--out", runs.parent / "no.pt")
    assert answer.code == 1 and "torchscript cannot hold OneBit" in answer.err
    assert not (runs.parent / "no.pt").exists()


def test_generating_packs_it(runs, bimamba):
    for scheme in ("OneBit", "Ternary"):
        answer = bimamba("generate", "--ckpt", runs / scheme, "--prompt", "a", "--max_new_tokens", "4")
        assert answer.code == 0, answer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.binarizer=Ternary", "--model.deploy=[gguf]"], "deploy: gguf cannot hold Ternary (backbone.layers.0"),
        (["--model.binarizer=GroupScale"], "in_proj: group_size=128 does not divide the layer's"),
        (["--model.binarizer=TwoSided", "--model.binarizer.init=nmf"], "init"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_step(options, sentence, bimamba, tiny, tmp_path):
    run = tmp_path / "run"
    answer = bimamba("fit", "-c", tiny.distill_recipe, *options, f"--trainer.default_root_dir={run}")
    assert answer.code == 1 and sentence in answer.err and "Traceback" not in answer.err, answer
    assert not run.exists()
