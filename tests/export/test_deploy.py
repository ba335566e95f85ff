"""Whether a model fits where it is to go is known before the first step."""

from functools import partial

import pytest
import yaml

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, binarize_
from bimamba_lit.errors import UserError
from bimamba_lit.export import FORMATS, export
from bimamba_lit.export.deploy import check_deploy


class ForScriptsOnly(ScaledSign):
    """A scheme that says where it fits."""

    formats = ("torchscript",)


def model(scheme):
    return binarize_(MambaLM(MambaConfig(d_model=128, n_layer=1, vocab_size=8, headdim=64, d_state=8)), scheme)


def test_what_fits():
    assert check_deploy(model(ScaledSign), FORMATS) is None
    assert check_deploy(model(FBI), [name for name in FORMATS if name != "gguf"]) is None
    assert check_deploy(model(ForScriptsOnly), ["torchscript"]) is None
    assert check_deploy(model(FBI), []) is None


@pytest.mark.parametrize(
    ("scheme", "formats", "sentence"),
    [
        (FBI, ["torchscript", "gguf"], "gguf cannot hold the model: .*in_proj.*shift"),
        (partial(ScaledSign, centred_rows=True), ["gguf"], "gguf cannot hold the model: .*shift"),
        (ForScriptsOnly, ["pt2"], "pt2 cannot hold ForScriptsOnly .*in_proj.*it fits torchscript"),
        (FBI, ["torchscrip"], "no format 'torchscrip'; did you mean 'torchscript'"),
    ],
)
def test_what_does_not_fit(scheme, formats, sentence):
    with pytest.raises(UserError, match=sentence):
        check_deploy(model(scheme), formats)


@pytest.mark.parametrize("format", ["pt2", "safetensors", "transformers"])
def test_exporting_what_does_not_fit_names_the_format_that_was_asked_for(tmp_path, format):
    model(ForScriptsOnly).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"^{format} cannot hold ForScriptsOnly"):
        export(tmp_path / "model", format, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_recipe_says_where_it_must_fit(tiny, bimamba, tmp_path):
    run = f"--trainer.default_root_dir={tmp_path / 'run'}"
    answer = bimamba("fit", "-c", tiny.distill_recipe, run, "--model.deploy=[torchscript, gguf]")
    assert answer.code == 1 and "gguf cannot hold the model" in answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    recipe["model"]["init_args"]["deploy"] = ["torchscript"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = bimamba("fit", "-c", tmp_path / "recipe.yaml", run, "--trainer.max_steps=1")
    assert answer.code == 0, answer
