"""The configuration of state-spaces folders, ``config.json`` as mamba_ssm writes it, both ways.

The names of tensors are ours. What a configuration leaves out has mamba_ssm's default; what our models cannot compute
is refused by name, and settings that only steer initialisation or the choice of a kernel change nothing here.
"""

from collections.abc import Mapping
from typing import Any

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.models.config import MambaConfig

_OURS = {
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "pad_vocab_size_multiple": 8,
    "residual_in_fp32": True,
    "tie_embeddings": True,
}
_ONLY: dict[str, Any] = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_WITHOUT_EFFECT = ("attn_cfg", "fused_add_norm")
_MIXERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
_MIXER_OURS = {
    "mamba": ("d_state", "d_conv", "expand", "dt_rank"),
    "mamba2": ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"),
}
_MIXER_ONLY: dict[str, Any] = {
    "bias": False,
    "conv_bias": True,
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
}
_MIXER_WITHOUT_EFFECT = (
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range"),
    *("use_fast_path", "use_mem_eff_path", "sequence_parallel"),
)
_NORM_EPS = 1e-5  # mamba_ssm's, which its configuration cannot change


def is_state_spaces(values: Mapping[str, Any]) -> bool:
    """Tell whether the content of a ``config.json`` is that of mamba_ssm."""
    return "model_type" not in values and "d_model" in values and "n_layer" in values


def state_spaces_config(values: Mapping[str, Any]) -> MambaConfig:
    """Return our configuration of a ``config.json`` of mamba_ssm.

    Raises:
        UserError: If a key is unknown, or a value is wrong or one that our models cannot compute.
    """
    known = [*_OURS, *_ONLY, *_WITHOUT_EFFECT, "ssm_cfg"]
    _check(values, known, _ONLY)
    options = values.get("ssm_cfg", {})
    if not isinstance(options, Mapping):
        raise UserError(f"ssm_cfg is {options!r}, and must be a mapping of a mixer's settings")
    layer = options.get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in _MIXERS:
        raise UserError(f"ssm_cfg.layer is {layer!r}, and this project has {' and '.join(_MIXERS)} only")
    mixer = _MIXERS[layer]
    ours = _MIXER_OURS[mixer]
    _check(options, ["layer", *ours, *_MIXER_ONLY, *_MIXER_WITHOUT_EFFECT, "dt_limit"], _MIXER_ONLY)
    if options.get("dt_limit", _NO_LIMIT) != _NO_LIMIT:
        raise UserError(f"ssm_cfg.dt_limit is {options['dt_limit']!r}, and models of this project have no limit")
    chosen = {name: values.get(name, default) for name, default in _OURS.items()}
    chosen |= {name: options[name] for name in ours if name in options}
    if chosen.get("dt_rank") == "auto":
        chosen["dt_rank"] = None
    return MambaConfig(**chosen, mixer=mixer)


def to_state_spaces(config: MambaConfig) -> dict[str, Any]:
    """Return the ``config.json`` with which mamba_ssm builds the same model.

    Raises:
        UserError: If mamba_ssm's configuration cannot say it.
    """
    kinds = set(config.mixers)
    if len(kinds) > 1:
        raise UserError("the model mixes Mamba-1 and Mamba-2, and a state-spaces folder has one kind of mixer")
    if config.norm_eps != _NORM_EPS:
        raise UserError(f"norm_eps is {config.norm_eps}, and mamba_ssm has {_NORM_EPS} only")
    mixer = kinds.pop()
    layer = next(name for name, ours in _MIXERS.items() if ours == mixer)
    return {
        **{name: getattr(config, name) for name in _OURS},
        **_ONLY,
        "attn_cfg": {},
        "fused_add_norm": True,
        "ssm_cfg": {"layer": layer, **{name: getattr(config, name) for name in _MIXER_OURS[mixer]}},
    }


_NO_LIMIT = [0.0, float("inf")]


def _check(values: Mapping[str, Any], known: list[str], only: Mapping[str, Any]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"mamba_ssm's configuration has no key {key!r}{nearest(str(key), known)}")
    for key, allowed in only.items():
        if values.get(key, allowed) != allowed:
            raise UserError(f"{key} is {values[key]!r}, and models of this project have it as {allowed!r} only")
