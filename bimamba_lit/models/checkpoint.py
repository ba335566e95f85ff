"""Models as folders (``config.json``, ``model.safetensors``) and inside Lightning checkpoints.

What a path holds is told by its content, never by its name. A model is built on the meta device, so that no memory
goes to weights about to be replaced, and each tensor is then copied out of the memory-mapped file: the peak is one
copy of the model beside pages of the file that the system can drop, and nothing refers to the file afterwards, so it
can be overwritten. Files are data only: pickles are read with ``weights_only=True``, and a binarization scheme is
looked up among those already imported.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bimamba_lit.binarize import DoubledInputs, PTBLinear, apply_binarization_, describe_binarization
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing_all
from bimamba_lit.models.bi_mamba_form import from_bi_mamba, is_bi_mamba
from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.lm import MambaLM
from bimamba_lit.models.plain_pickle import load_plain
from bimamba_lit.models.quantized_table import describe_tables, quantize_tables_
from bimamba_lit.models.sharded_folder import is_sharded, load_meta, load_state
from bimamba_lit.models.state_spaces_folder import is_state_spaces, state_spaces_config
from bimamba_lit.models.transformers_folder import is_transformers_mamba, our_name, transformers_config
from bimamba_lit.models.weight_files import WEIGHTS_FILE, Reader, is_plain_float, stored_tensors, write_safetensors

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

_FORMAT = "bimamba-lit"
_VERSION = 1
_READABLE = (
    "a folder of this project, of transformers' Mamba or Mamba2, of state-spaces (mamba_ssm) or of the released "
    "Bi-Mamba, or a Lightning checkpoint of this project, in one file or sharded"
)
_NAMES_SHOWN = 8
_LARGEST_CONFIG = 1 << 24  # bytes
_COMPUTE = "float32"
_LIKELY_LAYERS = 1000
_IN_MODULE = "lm."  # what a LightningModule calls its model


def describe(lm: MambaLM) -> dict[str, Any]:
    """Return what :func:`build` needs to make a model of the same shape, as plain JSON types."""
    description = _described(lm.config, describe_binarization(lm))
    tables = describe_tables(lm)
    return description if tables is None else description | {"tables": tables}


def build(description: Mapping[str, Any]) -> MambaLM:
    """Make a model, with fresh random weights, from what :func:`describe` returned.

    Raises:
        UserError: If the description is not one, is of a later version, or its values are wrong.
    """
    config, binarization, tables = _parts(description)
    lm = MambaLM(config)
    apply_binarization_(lm, binarization)
    if tables is not None:
        quantize_tables_(lm, tables.get("bits", 0), tables.get("group_size"))
    return lm


def copy_in_fp32(lm: MambaLM) -> MambaLM:
    """Return a model of the same weights in fp32 that shares none of them."""
    copy = in_fp32(build(describe(lm)))
    copy.load_state_dict(lm.state_dict())
    return copy


def in_fp32(lm: MambaLM) -> MambaLM:
    """Return a model whose every float is in fp32: the one given, changed where it has others."""
    # What is wide already is left alone: tensors without values cannot be converted in place.
    floats = [tensor for tensor in lm.state_dict().values() if tensor.is_floating_point()]
    return lm if all(tensor.dtype == torch.float32 for tensor in floats) else lm.float()


def save_lm(
    lm: MambaLM, path: str | Path, tokenizer: str | None = None, stored_dtype: torch.dtype | None = None
) -> None:
    """Write a model as a folder; see :meth:`MambaLM.save_pretrained`.

    Args:
        lm: The model.
        path: The folder.
        tokenizer: The tokenizer as the JSON text of its ``to_json()``.
        stored_dtype: What all but signs, whole numbers and post-training results is rounded to in the file; the model
            that is loaded from it computes in fp32. None stores and loads every tensor as it is.

    Raises:
        UserError: If the folder cannot be written, or a value is outside the range of ``stored_dtype``.
    """
    description = describe(lm)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _stored(lm).items()}
    if stored_dtype is not None:
        description["loads_as"] = _COMPUTE
        kept = _kept_as_stored(lm)
        tensors = {n: tensor if n in kept else rounded(tensor, stored_dtype, n) for n, tensor in tensors.items()}
    texts = {CONFIG_FILE: json.dumps(description, indent=2) + "\n"}
    if tokenizer is not None:
        texts[TOKENIZER_FILE] = tokenizer
    with replacing_all(Path(path), [*texts, WEIGHTS_FILE]) as files:
        for name, text in texts.items():
            files[name].write_text(text, encoding="utf-8")
        write_safetensors(tensors, files[WEIGHTS_FILE])


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor of floats in another type, and one of whole numbers as it is.

    Raises:
        UserError: If a finite value is outside the range of the type.
    """
    if not tensor.is_floating_point():
        return tensor
    there = tensor.to(dtype)
    if tensor.isfinite().all() and not there.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} has values outside the range of {kind}; store the model as bfloat16 or float32")
    return there


def load_lm(path: str | Path) -> MambaLM:
    """Load a model from a folder or a Lightning checkpoint; see :meth:`MambaLM.from_pretrained`.

    Under torch's ``FakeTensorMode`` tensors have no values, and none are read.
    """
    source = _existing(path)
    if active_fake_mode() is not None:
        return _outlined(source)
    if source.is_dir() and not is_sharded(source):
        return _load_folder(source)
    checkpoint = read_lightning(source)
    state = load_state(source) if source.is_dir() else checkpoint["state_dict"]
    readers: dict[str, Reader] = {
        name.removeprefix(_IN_MODULE): partial(_itself, tensor)
        for name, tensor in state.items()
        if isinstance(name, str) and name.startswith(_IN_MODULE) and isinstance(tensor, Tensor)
    }
    return _assemble(checkpoint["lm"], readers, source)


def load_tokenizer_json(path: str | Path) -> str | None:
    """Return the JSON text of the tokenizer saved with a model, or None where there is none.

    Args:
        path: The folder or the Lightning checkpoint.

    Raises:
        UserError: If nothing is there or it cannot be read.
    """
    source = _existing(path)
    if source.is_dir() and not is_sharded(source):
        file = source / TOKENIZER_FILE
        try:
            return file.read_text(encoding="utf-8") if file.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    tokenizer = read_lightning(source).get("tokenizer")
    return tokenizer if isinstance(tokenizer, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``, ours or another program's.

    Raises:
        UserError: If there is none or it is not a mapping in JSON.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        run = folder / "checkpoints" / "last.ckpt"
        hint = f"; it is a run folder, so give {run}" if run.exists() else ""
        raise UserError(f"{folder} holds no model: there is no {CONFIG_FILE} in it{hint}")
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{file} is {file.stat().st_size >> 20} MiB long, and no configuration is")
        config = json.loads(file.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no mapping of keys to values, and so describes no model")
    return config


def _load_folder(folder: Path) -> MambaLM:
    values = read_config(folder)
    if not (values.get("format") == _FORMAT or is_transformers_mamba(values) or is_state_spaces(values)):
        kind = "a folder of an unknown kind"
        if "model_type" in values:
            kind = f"a transformers folder of the model type {values['model_type']!r}"
        raise UserError(f"{folder} is {kind}, which this version does not read; it reads {_READABLE}")
    with stored_tensors(folder) as readers:
        try:
            description, ours = _in_our_terms(values, readers)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        return _assemble(description, ours, folder)


def _outlined(source: Path) -> MambaLM:
    """Build the model that a path describes, in the type that it is stored in."""
    with unset_fake_temporarily():
        if source.is_file() or is_sharded(source):
            description, stored = read_lightning(source)["lm"], None
        else:
            values = read_config(source)
            description, stored = _in_our_terms(values, {})[0], values.get("dtype", values.get("torch_dtype"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, stored) if stored in ("float16", "bfloat16") else before)
    try:
        return build(description)
    finally:
        torch.set_default_dtype(before)


def _in_our_terms(values: dict[str, Any], readers: dict[str, Reader]) -> tuple[dict[str, Any], dict[str, Reader]]:
    """Return our description and our names for what a folder holds, ours or another program's."""
    if values.get("format") == _FORMAT:
        return values, readers
    if is_transformers_mamba(values):
        return _described(transformers_config(values), []), {our_name(name): read for name, read in readers.items()}
    config = state_spaces_config(values)
    if is_bi_mamba(readers):
        ours, binarization = from_bi_mamba(readers)
        return _described(config, binarization), ours
    return _described(config, []), readers


def _described(config: MambaConfig, binarization: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "config": config.to_dict(),
        "binarization": binarization,
    }


def _parts(description: Mapping[str, Any]) -> tuple[MambaConfig, list[dict[str, Any]], Mapping[str, Any] | None]:
    """Return the configuration, what is binary, and how the tables are quantized, of a description."""
    if not isinstance(description, Mapping) or description.get("format") != _FORMAT:
        raise UserError(f"a model description must have the format '{_FORMAT}'")
    if description.get("format_version") != _VERSION:
        raise UserError(
            f"the model is saved in format version {description.get('format_version')!r} and this release of "
            f"bimamba-lit reads version {_VERSION}; install the release that wrote it"
        )
    config, binarization = description.get("config"), description.get("binarization")
    if not isinstance(config, Mapping) or not isinstance(binarization, list):
        raise UserError("a model description must hold 'config', a mapping, and 'binarization', a list")
    tables = description.get("tables")
    if not (tables is None or isinstance(tables, Mapping)):
        raise UserError(f"a model description's 'tables' must be a mapping, not {tables!r}")
    return MambaConfig.from_dict(config), binarization, tables


def read_lightning(file: Path) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint of this project; of a sharded one, all but ``state_dict``.

    Raises:
        UserError: If it is none, or is damaged.
    """
    if file.suffix == ".safetensors":
        raise UserError(f"{file} holds tensors without a configuration; give the folder it is in")
    sharded = is_sharded(file)
    checkpoint = load_meta(file) if sharded else load_plain(file, _READABLE)
    plain = isinstance(checkpoint, dict) and (sharded or isinstance(checkpoint.get("state_dict"), dict))
    if not plain or "lm" not in checkpoint:
        raise UserError(f"{file} is a PyTorch file of another program, not of this project; give {_READABLE}")
    return checkpoint


def _assemble(description: Mapping[str, Any], readers: Mapping[str, Reader], source: Path) -> MambaLM:
    """Build the model that is described and fill it with the tensors that are read."""
    lm = _on_meta(description, len(readers), source)
    targets, aliases = _stored(lm), _aliases(lm)
    dtype = torch.float32 if description.get("loads_as") == _COMPUTE else None
    found: dict[str, Tensor] = {}
    for name, read in readers.items():
        tensor = read()
        first = found.setdefault(aliases.get(name, name), tensor)
        if first is not tensor and not (first.shape == tensor.shape and torch.equal(first, tensor)):
            raise UserError(
                f"{source} says that {name} is tied to {aliases.get(name, 'another')} and holds both, unequal"
            )
    doubled = {f"{name}.bitmap": layer for name, layer in lm.named_modules() if isinstance(layer, DoubledInputs)}
    for name in doubled.keys() & found.keys():
        doubled[name].check_bitmap(found[name], f"{source}: {name}")
    wrong = [
        f"{name} {_kind(found[name])} instead of {_kind(target)}"
        for name, target in targets.items()
        if name in found and not _fits(found[name], target)
    ]
    faults = {
        "lacks": sorted(targets.keys() - found.keys()),
        "has the unknown": sorted(found.keys() - targets.keys()),
        "has in the wrong shape or type": sorted(wrong),
    }
    if any(faults.values()):
        told = "; ".join(f"{fault} {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{source} does not hold the tensors of the model it describes: it {told}")
    kept = _kept_as_stored(lm)
    _fill(lm, {name: _copied(found[name], None if name in kept else dtype) for name in targets})
    for name, layer in doubled.items():
        layer.read_bitmap_(f"{source}: {name}")
    return lm


def _on_meta(description: Mapping[str, Any], tensors: int, source: Path) -> MambaLM:
    """Build a model without memory for its weights, unless it has blocks without end and no tensors to fill them."""
    try:
        config, *_ = _parts(description)
        if config.n_layer > max(tensors, _LIKELY_LAYERS):
            raise UserError(f"n_layer is {config.n_layer}, and there are {tensors} tensors")
        with torch.device("meta"):
            return build(description)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(
            f"{source}: no model has the sizes of its configuration ({str(error).splitlines()[0]})"
        ) from error


def _fits(tensor: Tensor, target: Tensor) -> bool:
    return tensor.shape == target.shape and (
        is_plain_float(tensor) if target.is_floating_point() else tensor.dtype == target.dtype
    )


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()


def _stored(lm: nn.Module) -> dict[str, Tensor]:
    """Return what is saved of a model: its state, tied tensors under their first name only."""
    aliases = _aliases(lm)
    return {name: tensor for name, tensor in lm.state_dict(keep_vars=True).items() if name not in aliases}


def _kept_as_stored(lm: nn.Module) -> set[str]:
    """Return the names of the parts of post-training results, which are stored bit for bit."""
    layers = ((name, layer) for name, layer in lm.named_modules() if isinstance(layer, PTBLinear))
    return {f"{name}.{part}" for name, layer in layers for part in layer.parts}


def _aliases(lm: nn.Module) -> dict[str, str]:
    """Return the later names of tied parameters and buffers, each with the first."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in lm.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), name) != name
    }


def _fill(lm: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers; ties and marks such as ``_no_weight_decay`` stay."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in lm.named_modules():
        for key, old in module._parameters.items():
            if old is not None and id(old) not in made:
                new = nn.Parameter(tensors[f"{prefix}.{key}".lstrip(".")], requires_grad=old.requires_grad)
                new.__dict__.update(old.__dict__)
                made[id(old)] = new
            if old is not None:
                module._parameters[key] = made[id(old)]
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                module._buffers[key] = tensors[f"{prefix}.{key}".lstrip(".")]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _existing(path: str | Path) -> Path:
    source = Path(path)
    if not source.exists():
        siblings = [entry.name for entry in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"there is no file or folder {source}{nearest(source.name, siblings)}")
    return source
