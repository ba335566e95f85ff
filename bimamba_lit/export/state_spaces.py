"""Folders as mamba_ssm reads them: a plain model with dense weights, or the released Bi-Mamba form with latent ones."""

import json
from pathlib import Path

import torch
from torch import Tensor

from bimamba_lit.export.dtypes import dtype_named
from bimamba_lit.files import replacing_all
from bimamba_lit.models import MambaLM
from bimamba_lit.models.bi_mamba_form import to_bi_mamba
from bimamba_lit.models.checkpoint import CONFIG_FILE, TOKENIZER_FILE, rounded
from bimamba_lit.models.dense import dense_tensors, is_tied
from bimamba_lit.models.state_spaces_folder import to_state_spaces
from bimamba_lit.models.weight_files import PICKLE_FILE

_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


def export_state_spaces(lm: MambaLM, out: str | Path, tokenizer_json: str | None, *, dtype: str = "float32") -> None:
    """Write ``config.json`` and ``pytorch_model.bin`` for ``MambaLMHeadModel``, binary weights as dense matrices.

    Args:
        lm: The model, latent or packed, its mixers all of one kind.
        out: The folder.
        tokenizer_json: The tokenizer's JSON, saved beside the weights.
        dtype: What every tensor is rounded to: "float16", "bfloat16" or "float32".

    Raises:
        UserError: If mamba_ssm has no such model, a value does not fit ``dtype``, or the folder cannot be written.
    """
    _write(lm, dict(dense_tensors(lm)), out, tokenizer_json, dtype)


def export_bi_mamba(lm: MambaLM, out: str | Path, tokenizer_json: str | None, *, dtype: str = "float32") -> None:
    """Write the released Bi-Mamba form: latent weights, ``wscale`` and ``wbias`` under mamba_ssm's names.

    Args:
        lm: The binary model, latent or packed; of a packed one the signs stand for the latent weights.
        out: The folder.
        tokenizer_json: The tokenizer's JSON, saved beside the weights.
        dtype: What every tensor is rounded to: "float16", "bfloat16" or "float32".

    Raises:
        UserError: If the form cannot hold the model, a value does not fit ``dtype``, or the folder cannot be written.
    """
    _write(lm, to_bi_mamba(lm), out, tokenizer_json, dtype)


def _write(lm: MambaLM, tensors: dict[str, Tensor], out: str | Path, tokenizer_json: str | None, dtype: str) -> None:
    stored = dtype_named(dtype)
    tied = is_tied(lm)
    config = to_state_spaces(lm.config) | {"tie_embeddings": tied}
    state = {name: rounded(tensor, stored, name) for name, tensor in tensors.items() if not (tied and name == _HEAD)}
    if tied:
        state[_HEAD] = state[_EMBEDDING]  # mamba_ssm loads both names strictly; torch.save stores the values once
    names = [CONFIG_FILE, PICKLE_FILE, *([TOKENIZER_FILE] if tokenizer_json is not None else [])]
    with replacing_all(Path(out), names) as files:
        files[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer_json is not None:
            files[TOKENIZER_FILE].write_text(tokenizer_json, encoding="utf-8")
        torch.save(state, files[PICKLE_FILE])
