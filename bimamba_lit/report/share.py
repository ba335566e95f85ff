"""A folder to share: the packed model, its tokenizer, and a model card with the figures of its run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bimamba_lit import binarize
from bimamba_lit.errors import UserError
from bimamba_lit.export import export
from bimamba_lit.files import replacing
from bimamba_lit.models.checkpoint import load_lm
from bimamba_lit.models.count import true_bits
from bimamba_lit.report.summary import Summary, read_summary

CARD = "README.md"
_MIB = 8 * 1024**2
_ONE_BIT = 1.5  # with scales and second signs, the most that is called one


def share(run: str | Path, out: str | Path, options: dict[str, Any]) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and the model card of a finished run.

    Args:
        run: The run folder.
        out: The folder to write.
        options: Those of ``bimamba export --format safetensors``.

    Raises:
        UserError: If the run is not finished, or the folder is a file or the run itself, or cannot be written.
    """
    summary, folder = read_summary(run), Path(out)
    if folder.is_file():
        raise UserError(f"{folder} is a file, and what is shared is a folder")
    if folder.resolve() == Path(run).resolve():
        raise UserError(f"{folder} is the run's own folder: give another to --out")
    export(run, "safetensors", folder, options)
    if (embedding := options.get("embedding")) is not None:
        summary = replace(summary, true_bits=true_bits(load_lm(folder)))
    with replacing(folder / CARD) as temporary:
        temporary.write_text(model_card(summary, folder, embedding), encoding="utf-8")


def model_card(summary: Summary, folder: Path, embedding: str | None = None) -> str:
    """Return the text of a model card, in the form of the Hugging Face hub, from a run's figures.

    Args:
        summary: The figures.
        folder: The folder that the model lies in, whose file sizes are told.
        embedding: What its embedding and head were rounded to after the figures were measured.
    """
    kind, weights = _weights(summary)
    data = f"{summary.eval_data['name']} (SHA-256 {summary.eval_data['sha256'][:12]}…)"
    before, tables = "", ""
    if embedding is not None:
        before, tables = f", before its embedding was rounded to {embedding}", f"embedding and head in {embedding}, "
    rows = {
        "bits per byte": f"{summary.bits_per_byte:.3f}{before}",
        "perplexity a token": f"{summary.perplexity:.2f}",
        "measured on": f"{data}, windows of {summary.context} tokens, {summary.stride} apart",
        "the teacher's likeliest token taken": None if summary.agreement is None else f"{summary.agreement:.1%}",
        "weights": weights,
        "true size": f"{summary.true_bits / _MIB:.2f} MiB, {tables}all else at 16 bits",
        "trained on": f"{summary.tokens_seen:,} tokens",
        "teacher": summary.teacher,
        "seed": summary.seed,
        "made with": f"bimamba-lit {summary.version}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    files = "\n".join(
        f"* `{file.name}`: {file.stat().st_size:,} bytes"
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != CARD and not file.name.startswith(".")
    )
    return f"""---
library_name: bimamba-lit
pipeline_tag: text-generation
tags: [mamba, {"1-bit, " if "1-bit" in kind else ""}bimamba-lit]
---

# {summary.name}

A Mamba language model {kind}, made with bimamba-lit (Bi-Mamba: arXiv 2411.11843).

| | |
|---|---|
{table}
{_needs(summary.scheme)}
```python
from bimamba_lit import MambaLM

lm = MambaLM.from_pretrained("path/to/this/folder")  # signs stay packed
```

```bash
bimamba generate --ckpt path/to/this/folder --prompt 'Once upon a time'
bimamba export --ckpt path/to/this/folder --format torchscript --out model.pt  # needs bimamba-lit no longer
```

{files}
"""


def _weights(summary: Summary) -> tuple[str, str]:
    """Return what kind of weights a model has, and how many, in words."""
    weights = f"{summary.params:,}"
    if not summary.binarized_params:
        return "in full precision", weights
    bits = (summary.binarized_bits or 0) / summary.binarized_params
    second = " and second signs" if "doubled" in (summary.storage or {}) else ""
    width = "1-bit weights" if bits <= _ONE_BIT else f"weights of {bits:.1f} bits"
    weights += f", {summary.binarized_params / summary.params:.1%} of them binarized"
    weights += f": {bits:.2f} bits each, scales{second} counted" if bits else ""
    return f"with {width} ({summary.scheme})", weights


def _needs(scheme: str) -> str:
    """Return what loading takes where a scheme is not this project's, and nothing where all are."""
    names = [] if scheme == "fp" else scheme.split("+")
    others = [name for name in names if not hasattr(binarize.ptb if "." in name else binarize, name.split(".")[-1])]
    told = f"\nImport the module that defines {' and '.join(others)} first: with `--import MODULE` in the commands.\n"
    return told if others else ""
