"""``summary.json``: what a run came to, written when it is done."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import write_json
from bimamba_lit.models.count import FULL_PRECISION

FILE_NAME = "summary.json"


@dataclass(frozen=True)
class TextResult:
    """What a run makes of a text other than the one it is validated on.

    Attributes:
        name: The text's name.
        sha256: Of its UTF-8 bytes.
        bits_per_byte: As in the summary.
        perplexity: As in the summary.
    """

    name: str
    sha256: str
    bits_per_byte: float
    perplexity: float


@dataclass(frozen=True)
class Summary:
    """The result of a run and what is needed to lay it beside others.

    Attributes:
        name: The run's name, its folder's as a rule.
        scheme: ``fp`` for full precision, the class name for a trained binary scheme, ``ptb.NAME`` where the model was
            binarized and not trained after it.
        bits_per_byte: Negative log-likelihood of the evaluation text, in bits, over its UTF-8 bytes.
        perplexity: Perplexity a token, so comparable under one tokenizer only.
        eval_data: ``name`` and ``sha256`` of the evaluation text.
        context: Tokens of an evaluation window.
        stride: Tokens from one evaluation window to the next.
        params: Weights of the model, scales included.
        binarized_params: Those of them in binary layers, or in layers of a few bits fitted after training.
        true_bits: Bits it takes to store the whole model.
        tokens_seen: Tokens trained or calibrated on.
        seconds: Seconds of training or calibration.
        seed: The seed of everything; None where none was set.
        teacher: The path of the teacher; None without one.
        version: The version of this package.
        storage: Bits by part: those of all binary layers, such as ``signs``, and ``full_precision``, all the rest. They
            add up to ``true_bits``; None where it was not written down.
        agreement: Share of positions, 0 to 1, where the likeliest token is the teacher's; None where not measured.
        tests: What it makes of other texts, in the order of the recipe's ``tests``.
    """

    name: str
    scheme: str
    bits_per_byte: float
    perplexity: float
    eval_data: Mapping[str, str]
    context: int
    stride: int
    params: int
    binarized_params: int
    true_bits: int
    tokens_seen: int
    seconds: float
    seed: int | None
    teacher: str | None
    version: str
    agreement: float | None = None
    storage: Mapping[str, int] | None = None
    tests: Sequence[TextResult] = ()

    @property
    def binarized_bits(self) -> int | None:
        """Bits that hold the binary layers, signs, scales, masks and all; None where that was not written down."""
        if self.storage is None:
            return None
        return sum(bits for part, bits in self.storage.items() if part != FULL_PRECISION)


def write_summary(run_dir: str | Path, summary: Summary) -> Path:
    """Write ``summary.json`` into a run folder, all of it or nothing, and return its path.

    Raises:
        UserError: If the file cannot be written.
    """
    path = Path(run_dir) / FILE_NAME
    write_json(path, asdict(summary))
    return path


def read_summary(run_dir: str | Path) -> Summary:
    """Read the summary of a run folder.

    Raises:
        UserError: If there is no such folder, its run is not finished, or the file is not a whole summary.
    """
    folder = Path(run_dir)
    path = folder / FILE_NAME
    if not folder.exists():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"there is no run folder {folder}{nearest(folder.name, siblings)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, where a run folder is needed")
    if not path.exists():
        raise UserError(
            f"{folder} has no {FILE_NAME}: its run is not finished (add --ckpt_path last to its fit command) "
            "or it is not a run folder"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut off or no JSON ({error}): let `bimamba validate` write it anew") from error
    return _checked(values, path)


def _checked(values: Any, path: Path) -> Summary:
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object, so it is no summary of a run")
    known = {field.name for field in fields(Summary)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{path} has the unknown key '{unknown[0]}'{nearest(unknown[0], known)}")
    if missing := sorted(known - set(values) - {"agreement", "storage", "tests"}):
        raise UserError(f"{path} lacks {', '.join(missing)}: let `bimamba validate` write it anew")
    return Summary(**{name: _value(name, value, _KINDS[name], path) for name, value in values.items()})


_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_KINDS = {field.name: field.type for field in fields(Summary)}
_RESULT = {field.name: field.type for field in fields(TextResult)}


def _value(name: str, value: Any, kind: Any, path: Path) -> Any:
    if value is None and isinstance(kind, UnionType):
        return None
    if kind in (float, float | None):
        value = _WORDS.get(value, value) if isinstance(value, str) else value
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif kind in (int, int | None):
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif kind in (str, str | None):
        fits, wanted = isinstance(value, str), "text"
    elif name == "tests":
        if isinstance(value, list) and all(isinstance(one, dict) and set(one) == set(_RESULT) for one in value):
            return tuple(
                TextResult(**{part: _value(f"{name}.{part}", one[part], _RESULT[part], path) for part in _RESULT})
                for one in value
            )
        fits, wanted = False, f"a list of objects of {', '.join(_RESULT)}"
    elif name == "storage":
        fits, wanted = isinstance(value, dict) and all(type(bits) is int for bits in value.values()), "bits by part"
    else:
        fits, wanted = isinstance(value, dict) and set(value) == {"name", "sha256"}, "an object of name and sha256"
        fits = fits and all(isinstance(part, str) for part in value.values())
    if not fits:
        raise UserError(f"{path}: {name} is {value!r}, where {wanted} is needed")
    return float(value) if kind in (float, float | None) else value
