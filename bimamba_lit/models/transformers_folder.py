"""The configuration and tensor names of transformers' Mamba and Mamba2 models, both ways.

Their parameters are ours under nearly the same names, so a folder of theirs is read and written without transformers.
What our models cannot compute is refused by name: no option of a folder is passed over in silence.
"""

from collections.abc import Mapping
from typing import Any

from bimamba_lit.errors import UserError
from bimamba_lit.models.config import MambaConfig

_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
}
_MIXER_FIELDS = {
    "mamba": {"time_step_rank": "dt_rank"},
    "mamba2": {"head_dim": "headdim", "n_groups": "ngroups", "chunk_size": "chunk_size"},
}
_TIED_UNLESS_SAID = {"mamba": True, "mamba2": False}  # transformers' defaults
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "hidden_act": ("silu", "swish"),
    "rms_norm": (True,),
}
_INFINITY = (float("inf"), {"__float__": "Infinity"})  # the second since transformers 5


def is_transformers_mamba(values: Mapping[str, Any]) -> bool:
    """Tell whether the content of a ``config.json`` is that of transformers' Mamba or Mamba2."""
    kind = values.get("model_type")
    return isinstance(kind, str) and kind in _MIXER_FIELDS


def transformers_config(values: Mapping[str, Any]) -> MambaConfig:
    """Return our configuration of a transformers ``config.json`` of the model type ``mamba`` or ``mamba2``.

    ``vocab_size`` there is the number of rows of the embedding, padding included; it is not padded further.

    Raises:
        UserError: If a key is missing, or a value is wrong or one that our models cannot compute.
    """
    mixer = values["model_type"]
    fields = _FIELDS | _MIXER_FIELDS[mixer]
    for key in fields:
        if values.get(key) is None:
            raise UserError(f"the configuration of the model type '{mixer}' lacks the key '{key}'")
    for key, allowed in _ONLY.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} is {values[key]!r}, and models of this project have it as {allowed[0]!r} only")
    _check_time_step_limit(values.get("time_step_limit"))
    chosen = {ours: values[theirs] for theirs, ours in fields.items()}
    if chosen.get("dt_rank") == "auto":
        chosen["dt_rank"] = None
    tied = values.get("tie_word_embeddings", _TIED_UNLESS_SAID[mixer])
    config = MambaConfig(**chosen, mixer=mixer, tie_embeddings=tied, pad_vocab_size_multiple=1)
    for key, derived in (("num_heads", config.nheads), ("intermediate_size", config.d_inner)):
        if key in values and key in _DERIVED[mixer] and values[key] != derived:
            raise UserError(f"{key} is {values[key]!r}, and the other sizes make it {derived}")
    return config


def our_name(name: str) -> str:
    """Return our name of a tensor of transformers' Mamba or Mamba2."""
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def their_name(name: str) -> str:
    """Return transformers' name of a tensor of ours."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def to_transformers(config: MambaConfig, tied: bool) -> dict[str, Any]:
    """Return the ``config.json`` with which transformers builds the same model, its table without padding.

    Args:
        config: The model's configuration.
        tied: Whether embedding and head are one table.

    Raises:
        UserError: If transformers has no such model.
    """
    kinds = set(config.mixers)
    if len(kinds) > 1:
        raise UserError("the model mixes Mamba-1 and Mamba-2, and transformers has a class for either, not for both")
    mixer = kinds.pop()
    fields = _FIELDS | _MIXER_FIELDS[mixer]
    derived = {"intermediate_size": config.d_inner} if mixer == "mamba" else {"num_heads": config.nheads}
    return {
        "architectures": ["MambaForCausalLM" if mixer == "mamba" else "Mamba2ForCausalLM"],
        "model_type": mixer,
        **{theirs: getattr(config, ours) for theirs, ours in fields.items()},
        **derived,
        **{key: allowed[0] for key, allowed in _ONLY.items() if key != "rms_norm"},
        "tie_word_embeddings": tied,
    }


_DERIVED = {"mamba": ("intermediate_size",), "mamba2": ("num_heads",)}


def _check_time_step_limit(limit: Any) -> None:
    # A softplus is positive, so any lower limit up to zero changes nothing.
    if limit is None or (isinstance(limit, list) and len(limit) == 2 and limit[0] == 0 and limit[1] in _INFINITY):
        return
    raise UserError(f"time_step_limit is {limit!r}, and models of this project have no limit, [0.0, Infinity], only")
