"""GGUF, llama.cpp's file, for what it holds exactly: binary layers as ``Q1_0``, see ``q1_0.py``.

Names, shapes and types of tensors are those of llama.cpp's own converter for the architectures ``mamba`` and
``mamba2``: ``A`` as ``-exp(A_log)``, the padding of the table cut, embedding and dense matrices F16, the rest F32.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bimamba_lit.binarize import quantized_layers
from bimamba_lit.errors import UserError
from bimamba_lit.export.gguf_vocabulary import add_vocabulary
from bimamba_lit.export.options import check_is_file
from bimamba_lit.export.q1_0 import Fit, as_blocks, fit
from bimamba_lit.files import replacing
from bimamba_lit.models import MambaConfig, MambaLM
from bimamba_lit.models.checkpoint import rounded
from bimamba_lit.models.dense import dense_tensors

_NAMES = {"backbone.embedding": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
}
_MATRICES = ("token_embd", "output", "ssm_in", "ssm_x", "ssm_dt", "ssm_out")
_TABLES = ("token_embd.weight", "output.weight")
_TABLE_TYPES = {"int8": "Q8_0", "int4": "Q4_0"}
_TABLE_BLOCK = 32
_CONTEXT = 1 << 20  # llama.cpp's converter: any length, for a model that has no limit


def export_gguf(
    lm: MambaLM,
    out: str | Path,
    tokenizer_json: str | None,
    *,
    embedding: str | None = None,
    fallback: str | None = None,
) -> None:
    """Write a GGUF file that llama.cpp runs as the architecture ``mamba`` or ``mamba2``.

    Args:
        lm: The model, latent or packed, its mixers all of one kind.
        out: The file.
        tokenizer_json: The tokenizer's JSON: bytes, or a byte-level BPE that splits as GPT-2's; None writes none.
        embedding: "int8" or "int4" writes the embedding and a dense head as Q8_0 or Q4_0, whose blocks are 32 wide;
            None as F16.
        fallback: "f16" writes binary layers that Q1_0 cannot hold as dense F16; None refuses them.

    Raises:
        UserError: If the package ``gguf`` is missing, a layer or the tokenizer does not fit, or the file cannot be
            written.
    """
    if embedding is not None and (embedding not in _TABLE_TYPES or lm.config.d_model % _TABLE_BLOCK):
        raise UserError(
            f"the embedding can be {' or '.join(_TABLE_TYPES)} where its width is a multiple of {_TABLE_BLOCK}, not "
            f"'{embedding}' with the width {lm.config.d_model}"
        )
    if fallback not in (None, "f16"):
        raise UserError(f"the fallback can be f16, not '{fallback}'")
    check_is_file(Path(out), "gguf")
    gguf = _package()
    mixer = _only_mixer(lm.config)
    fits = _fits(lm, fallback)
    writer = gguf.GGUFWriter(None, mixer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q1_0 if fits else gguf.LlamaFileType.MOSTLY_F16)
    _add_sizes(writer, lm.config, mixer)
    add_vocabulary(writer, tokenizer_json, lm.config.known_vocab_size)
    gains = {_norm_before(name): found.gain for name, found in fits.items() if found.gain is not None}
    layers = dict(quantized_layers(lm))
    for name, found in fits.items():
        blocks = as_blocks(name, layers[name], found.scale)
        writer.add_tensor(f"{_their_name(name)}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q1_0)
    for name, tensor in dense_tensors(lm, leave_out=fits):
        theirs, values = _converted(lm.config, name, tensor.float(), gains)
        if embedding is not None and theirs in _TABLES:
            kind = gguf.GGMLQuantizationType[_TABLE_TYPES[embedding]]
            writer.add_tensor(theirs, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, values)
    with replacing(out) as file:
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def check_gguf(lm: MambaLM) -> None:
    """Raise a UserError that names the first layer of a model that a GGUF file cannot hold."""
    _only_mixer(lm.config)
    _fits(lm, None)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs the package gguf: pip install 'bimamba-lit[gguf]'") from error
    return gguf


def _only_mixer(config: MambaConfig) -> str:
    kinds = set(config.mixers)
    if len(kinds) > 1:
        raise UserError("the model mixes Mamba-1 and Mamba-2, and llama.cpp has an architecture for either, not both")
    return kinds.pop()


def _fits(lm: MambaLM, fallback: str | None) -> dict[str, Fit]:
    """Return the binary layers that Q1_0 holds, by name."""
    fits: dict[str, Fit] = {}
    modules = dict(lm.named_modules())
    for name, layer in quantized_layers(lm):
        found = fit(layer, after_norm=_norm_before(name) in modules)
        if isinstance(found, Fit):
            fits[name] = found
        elif fallback is None:
            raise UserError(
                f"{name} ({layer.kind()['scheme']}) does not fit Q1_0: {found}; what fits is one scale by row or by "
                "128 inputs of a row, as ScaledSign has, and by input where a norm comes before, all without shifts; "
                "or give --fallback f16 to write such layers as F16"
            )
    return fits


def _norm_before(name: str) -> str:
    """Return the norm whose gain is the last thing before a layer, where its model has one there."""
    if name == "lm_head":
        return "backbone.norm_f"
    mixer, _, last = name.rpartition(".")
    return (
        f"{mixer.removesuffix('.mixer')}.norm" if last == "in_proj" else f"{mixer}.norm" if last == "out_proj" else ""
    )


def _add_sizes(writer: Any, config: MambaConfig, mixer: str) -> None:
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    if mixer == "mamba":
        writer.add_ssm_time_step_rank(config.dt_rank)
        writer.add_ssm_dt_b_c_rms(False)
    else:
        writer.add_ssm_time_step_rank(config.nheads)
        writer.add_ssm_group_count(config.ngroups)


def _their_name(name: str) -> str:
    """Return llama.cpp's name of a module, or of a parameter that is its mixer's own."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[inner]}"


def _converted(config: MambaConfig, name: str, tensor: Tensor, gains: dict[str, Tensor]) -> tuple[str, NDArray[Any]]:
    """Return llama.cpp's name of a tensor and its values as they lie in the file."""
    module, _, last = name.rpartition(".")
    theirs = f"{_their_name(module)}.{last}" if last in ("weight", "bias") else _their_name(name)
    kind = theirs.removesuffix(".weight").rpartition(".")[2]
    if (gain := gains.get(module)) is not None:
        tensor = tensor * gain
    if last == "A_log":
        tensor = -torch.exp(tensor)
    if kind == "ssm_conv1d":
        tensor = tensor.squeeze(1)
    if "mamba2" in config.mixers and last in ("A_log", "D"):
        tensor = tensor.unsqueeze(1)
    if kind == "ssm_norm":
        tensor = tensor.unflatten(0, (config.ngroups, -1))
    if kind in ("token_embd", "output"):
        tensor = tensor[: config.known_vocab_size]
    if last == "weight" and kind in _MATRICES:
        tensor = rounded(tensor, torch.float16, name)
    return theirs, np.ascontiguousarray(tensor.detach().cpu().numpy())
