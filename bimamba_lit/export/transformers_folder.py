"""A transformers folder with dense weights, for programs that know nothing of binary ones."""

import json
from pathlib import Path
from typing import Any

from bimamba_lit.data.tokenizer import SubwordTokenizer
from bimamba_lit.export.dtypes import dtype_named
from bimamba_lit.export.tokenizer_json import as_tokenizer_json
from bimamba_lit.files import replacing_all
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import CONFIG_FILE, TOKENIZER_FILE, rounded
from bimamba_lit.models.dense import dense_tensors, is_tied
from bimamba_lit.models.transformers_folder import their_name, to_transformers
from bimamba_lit.models.weight_files import WEIGHTS_FILE, write_safetensors

_TABLES = ("backbone.embedding.weight", "lm_head.weight")


def export_transformers(lm: MambaLM, out: str | Path, tokenizer_json: str | None, *, dtype: str = "float16") -> None:
    """Write a folder that transformers' ``MambaForCausalLM`` or ``Mamba2ForCausalLM`` loads with no code of ours.

    A binary weight is written as the dense matrix that it stands for; the padding rows of the tables are left out.

    Args:
        lm: The model, latent or packed, its mixers all of one kind.
        out: The folder.
        tokenizer_json: The tokenizer's JSON, written as transformers' fast tokenizer; bytes too.
        dtype: What every tensor is rounded to: "float16", "bfloat16" or "float32".

    Raises:
        UserError: If transformers has no such model, a value does not fit ``dtype``, or the folder cannot be written.
    """
    stored = dtype_named(dtype)
    config = to_transformers(lm.config, is_tied(lm)) | {"dtype": dtype}
    texts, special = _tokenizer_files(tokenizer_json)
    texts[CONFIG_FILE] = json.dumps(config | special, indent=2) + "\n"
    rows = lm.config.known_vocab_size
    tensors = {
        their_name(name): rounded(tensor[:rows] if name in _TABLES else tensor, stored, name).contiguous()
        for name, tensor in dense_tensors(lm)
    }
    with replacing_all(Path(out), [*texts, WEIGHTS_FILE]) as files:
        for name, text in texts.items():
            files[name].write_text(text, encoding="utf-8")
        write_safetensors(tensors, files[WEIGHTS_FILE])


def _tokenizer_files(tokenizer_json: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the tokenizer's files, and the special tokens of the configuration.

    transformers' own defaults, 0 to 2, would be the ids of ordinary tokens.
    """
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer_json is None:
        return {}, special
    definition = as_tokenizer_json(tokenizer_json)
    tokenizer = SubwordTokenizer(definition)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (separator := tokenizer.separator) is not None:
        special = dict.fromkeys(special, separator)
        token = tokenizer.tokens()[separator]
        settings |= {"eos_token": token, "pad_token": token, "bos_token": token}
    return {TOKENIZER_FILE: definition, "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}, special
