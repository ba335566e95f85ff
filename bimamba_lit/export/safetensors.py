"""Packed safetensors: signs as bits, scales, and the rest in 16 bits; the embedding in 8 or 4 bits if asked."""

from pathlib import Path

from bimamba_lit.binarize import check_format
from bimamba_lit.errors import UserError
from bimamba_lit.export.options import stored_dtype
from bimamba_lit.export.packed_copy import packed_copy
from bimamba_lit.models import MambaLM
from bimamba_lit.models.checkpoint import save_lm
from bimamba_lit.models.quantized_table import quantize_tables_

_BITS = {"int8": 8, "int4": 4}


def export_safetensors(
    lm: MambaLM,
    out: str | Path,
    tokenizer_json: str | None,
    *,
    dtype: str = "float16",
    embedding: str | None = None,
    group_size: int | None = None,
) -> None:
    """Write a folder that ``MambaLM.from_pretrained`` loads packed, computing in fp32 with the values as stored.

    Args:
        lm: The model, latent or packed.
        out: The folder.
        tokenizer_json: The tokenizer's JSON, saved beside the weights.
        dtype: What all but signs is rounded to: "float16", "bfloat16" or "float32".
        embedding: "int8" or "int4" for the embedding and the output head, which are in ``dtype`` otherwise.
        group_size: Entries of the embedding that share a scale; None for a whole row.

    Raises:
        UserError: If an option is wrong, a value does not fit ``dtype``, or the folder cannot be written.
    """
    stored = stored_dtype(dtype)
    check_format(lm, "safetensors")
    packed = packed_copy(lm)
    if embedding is not None:
        if embedding not in _BITS:
            raise UserError(f"the embedding can be {' or '.join(_BITS)}, not '{embedding}'")
        quantize_tables_(packed, _BITS[embedding], group_size, stored)
    elif group_size is not None:
        raise UserError("a group size is of an embedding in 8 or 4 bits: choose int8 or int4 too")
    save_lm(packed, out, tokenizer_json, stored)
