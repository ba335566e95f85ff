"""Recipes changed at random, in their text and in their settings: a run that could begin, or one sentence."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimamba_lit.cli import _sentence
from bimamba_lit.errors import UserError

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TEXTS = {path.stem: path.read_bytes() for path in RECIPES}
SETTINGS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}

WORDS = (
    """
bimamba_lit.training.Distill bimamba_lit.training.Pretrain bimamba_lit.training.PTB bimamba_lit.binarize.FBI FBI
bimamba_lit bimamba_lit.callbacks.BitFlips torch.nn.Linear os os.path builtins.int lightning.pytorch.Trainer . .. a.
.b teacher cpu auto bytes bpe:0 bpe:99999999999 hub: hub:a offline 16-mixed true null None 1e3
${trainer.max_steps} ${nothing} ${oc.env:NOTHING} ${ $ é 漢漢 - --x ~ * ? / /dev/null
""".split()
    + ["\x00", "\ud7ff", "a\nb", " ", "a" * 5000]
)
KEYS = "class_path init_args dict_kwargs model data trainer teacher binarizer optimizer callbacks logger 0".split() + [
    ""
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.sampled_from([10**15, 2**63, -(2**64), 10**400, math.inf, -math.inf, math.nan, 1e-320])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=5,
)


def changed(data: st.DataObject, value: Any) -> Any:
    """Change something somewhere inside of a setting."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(list(value)))
        rest = {name: item for name, item in value.items() if name != key}
        match data.draw(st.sampled_from(["inside", "inside", "inside", "drop", "add", "replace", "rename", "swap"])):
            case "drop":
                return rest
            case "add":
                return value | {data.draw(st.sampled_from(KEYS) | st.text(max_size=8)): data.draw(values)}
            case "replace":
                return value | {key: data.draw(values)}
            case "rename":
                return rest | {_misspelt(data, str(key)): value[key]}
            case "swap":
                other = data.draw(st.sampled_from(list(value)))
                return value | {key: value[other], other: value[key]}
            case _:
                return value | {key: changed(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(data, value[place]), *value[place + data.draw(st.integers(0, 1)) :]]
    return data.draw(values)


def _misspelt(data: st.DataObject, word: str) -> str:
    place = data.draw(st.integers(0, max(0, len(word) - 1)))
    return word[:place] + data.draw(st.sampled_from(["", "x", "-", " ", ".", "é"])) + word[place + 1 :]


PIECES = (
    rb""":;: ;- ;#;\t;  ;{;};[;];&a ;*a ;*b;<<: *a;!!;!x ;!!python/object/apply:os.system [true];!!python/name:os.system
!!binary x;!!set {a};!!omap [a: b];|;>;';";---;...;${;${a:b};${oc.env:HOME};${oc.decode:x};${..x};? ;1_000;0x1f
1e999;.inf;.nan;2026-11-25;&a [*a];&a {b: *a};=;~;%YAML 1.1""".replace(b"\n", b";").split(b";")
) + [
    b"\n",
    b"\xff",
    b"\x00",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"[" * 2000 + b"]" * 2000,
    b"{a: " * 900,
    b"9" * 5000,
]


def damaged(data: st.DataObject, text: bytes) -> bytes:
    """Flip, cut, repeat and insert in a recipe's text."""
    out = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(out) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "piece", "piece", "line"])):
            case "flip" if out:
                out[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del out[place : place + data.draw(st.sampled_from([1, 5, 50, len(out)]))]
            case "repeat":
                out[place:place] = out[place : place + data.draw(st.integers(1, 60))]
            case "insert":
                out[place:place] = data.draw(st.binary(max_size=6))
            case "line":
                end = out.find(b"\n", place)
                out[end + 1 : end + 1] = data.draw(st.sampled_from(PIECES)) + b"\n"
            case _:
                out[place:place] = data.draw(st.sampled_from(PIECES))
    return bytes(out)


def told(error: BaseException) -> str:
    """Return what the command would print: one line, of an error that is the user's."""
    sentence = _sentence(error)
    assert "\n" not in sentence and "run again with --debug" not in sentence, sentence
    return sentence


def read(path: Path) -> Any:
    """Read and check a recipe; None where it is refused."""
    from bimamba_lit.training.command_line import GROUPS
    from bimamba_lit.training.recipe_check import check_settings
    from bimamba_lit.training.recipe_read import read_settings

    try:
        found = read_settings(["-c", str(path)])
        check_settings(found, GROUPS)
    except UserError as error:
        assert len(told(error)) < 2001
        return None
    return found


def build(path: Path, command: str) -> None:
    """Build all that a recipe names, and run nothing."""
    from bimamba_lit.training import command_line
    from bimamba_lit.training.run_folder import RunFolder

    class Nothing(command_line.CommandLine):
        run_folder, recipe = RunFolder(path.parent), {}

        def before_instantiate_classes(self) -> None: ...
        def _run_subcommand(self, subcommand: str) -> None: ...

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            command_line.build(command, command, ["-c", str(path)], Nothing)
        except Exception as error:
            told(error)


@pytest.fixture(scope="module", autouse=True)
def no_network():
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def a_recipe(data: st.DataObject, folder: Path) -> Path:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    path = folder / "recipe.yaml"
    if data.draw(st.booleans()):
        path.write_bytes(damaged(data, TEXTS[name]))
    else:
        mutated = SETTINGS[name]
        for _ in range(data.draw(st.integers(1, 2))):
            mutated = changed(data, mutated)
        path.write_text(yaml.safe_dump(mutated, allow_unicode=True), "utf-8", "surrogatepass")
    return path


@settings(**QUIET, max_examples=200, derandomize=True)
@given(data=st.data())
def test_a_recipe_or_one_sentence(folder, data):
    read(a_recipe(data, folder))


@settings(**QUIET, max_examples=15, derandomize=True)
@given(data=st.data())
def test_a_run_or_one_sentence(folder, data):
    path = a_recipe(data, folder)
    if read(path) is not None:
        build(path, "fit")


@pytest.mark.slow
@settings(**QUIET, max_examples=10_000)
@given(data=st.data())
def test_a_recipe_or_one_sentence_at_length(folder, data):
    read(a_recipe(data, folder))


@pytest.mark.slow
@settings(**QUIET, max_examples=1000)
@given(data=st.data())
def test_a_run_or_one_sentence_at_length(folder, data):
    path = a_recipe(data, folder)
    if read(path) is not None:
        build(path, data.draw(st.sampled_from(["fit", "validate"])))
