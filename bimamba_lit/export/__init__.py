"""A trained model in the form that another program runs.

Each format is one file with one function ``export_FORMAT(lm, out, tokenizer_json, **options)``, imported when it is
asked for. It writes aside and renames (``bimamba_lit.files.replacing``), and raises `UserError` for a model that the
format cannot hold.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bimamba_lit.distill import find_checkpoint
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json

FORMATS = ("torchscript", "pt2", "safetensors", "gguf", "transformers")
Exporter = Callable[..., None]
"""Called with the model, the path to write, the tokenizer as JSON or None, and the format's options by name."""


def export(path: str | Path, format: str, out: str | Path, options: dict[str, Any]) -> None:
    """Write a trained model in another program's form.

    Args:
        path: A run folder, a checkpoint or a saved model's folder.
        format: One of ``FORMATS``.
        out: The file or the folder to write. What is there is replaced once the new one is whole.
        options: The format's options by name.

    Raises:
        UserError: If the model cannot be read, the format cannot hold it or takes no such option, or ``out`` cannot be
            written. What was at ``out`` is then as it was.
    """
    write = _exporter(format)
    known = list(inspect.signature(write).parameters)[3:]
    for name in options:
        if name not in known:
            hint = nearest(name, known) or (f"; it takes {', '.join(known)}" if known else "")
            raise UserError(f"the format {format} takes no --{name}{hint}")
    checkpoint = find_checkpoint(path)
    lm = load_lm(checkpoint).eval().requires_grad_(False)
    write(lm, Path(out), load_tokenizer_json(checkpoint), **options)


def _exporter(format: str) -> Exporter:
    match format:
        case "torchscript":
            from bimamba_lit.export.torchscript import export_torchscript

            return export_torchscript
        case "pt2":
            from bimamba_lit.export.pt2 import export_pt2

            return export_pt2
        case "safetensors":
            from bimamba_lit.export.safetensors import export_safetensors

            return export_safetensors
        case "gguf":
            from bimamba_lit.export.gguf import export_gguf

            return export_gguf
        case "transformers":
            from bimamba_lit.export.transformers_folder import export_transformers

            return export_transformers
    raise UserError(f"there is no format '{format}'{nearest(format, FORMATS) or '; there are ' + ', '.join(FORMATS)}")
