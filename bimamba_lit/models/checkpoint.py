"""Models as folders (``config.json``, ``model.safetensors``) and inside Lightning checkpoints.

What a path holds is told by its content, never by its name. A model is built on the meta device, so that no memory
goes to weights about to be replaced, and each tensor is then copied out of the memory-mapped file: the peak is one
copy of the model beside pages of the file that the system can drop, and nothing refers to the file afterwards, so it
can be overwritten. Files are data only: pickles are read with ``weights_only=True``, and a binarization scheme is
looked up among those already imported.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit.binarize import apply_binarization_, describe_binarization
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.files import replacing
from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.lm import MambaLM
from bimamba_lit.models.safetensors_folder import WEIGHTS_FILE, Reader, stored_tensors
from bimamba_lit.models.transformers_folder import is_transformers_mamba, our_name, transformers_config

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

_FORMAT = "bimamba-lit"
_VERSION = 1
_READABLE = (
    "a folder written by MambaLM.save_pretrained, a transformers Mamba or Mamba2 folder, or a Lightning checkpoint of "
    "this project"
)
_NAMES_SHOWN = 8
_IN_MODULE = "lm."  # what a LightningModule calls its model


def describe(lm: MambaLM) -> dict[str, Any]:
    """Return what :func:`build` needs to make a model of the same shape, as plain JSON types."""
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "config": lm.config.to_dict(),
        "binarization": describe_binarization(lm),
    }


def build(description: Mapping[str, Any]) -> MambaLM:
    """Make a model, with fresh random weights, from what :func:`describe` returned.

    Raises:
        UserError: If the description is not one, is of a later version, or its values are wrong.
    """
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
    lm = MambaLM(MambaConfig.from_dict(config))
    apply_binarization_(lm, binarization)
    return lm


def copy_in_fp32(lm: MambaLM) -> MambaLM:
    """Return a model of the same weights in fp32 that shares none of them."""
    copy = build(describe(lm)).float()
    copy.load_state_dict(lm.state_dict())
    return copy


def save_lm(lm: MambaLM, path: str | Path, tokenizer: str | None = None) -> None:
    """Write a model as a folder; see :meth:`MambaLM.save_pretrained`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save the model to {folder}: it is a file, and a folder is needed")
    text = json.dumps(describe(lm), indent=2) + "\n"
    tensors = {name: tensor.detach().contiguous() for name, tensor in _stored(lm).items()}
    # All are written before the first is moved into place, so that a full disk leaves the model that was there whole.
    with ExitStack() as stack:
        stack.enter_context(replacing(folder / CONFIG_FILE)).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            stack.enter_context(replacing(folder / TOKENIZER_FILE)).write_text(tokenizer, encoding="utf-8")
        temporary = stack.enter_context(replacing(folder / WEIGHTS_FILE))
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {folder / WEIGHTS_FILE}: {error}") from error


def load_lm(path: str | Path) -> MambaLM:
    """Load a model from a folder or a Lightning checkpoint; see :meth:`MambaLM.from_pretrained`."""
    source = _existing(path)
    if source.is_dir():
        return _load_folder(source)
    checkpoint = _read_lightning(source)
    readers: dict[str, Reader] = {
        name.removeprefix(_IN_MODULE): partial(_itself, tensor)
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_IN_MODULE) and isinstance(tensor, Tensor)
    }
    return _assemble(partial(build, checkpoint["lm"]), readers, source)


def load_tokenizer_json(path: str | Path) -> str | None:
    """Return the JSON text of the tokenizer saved with a model, or None where there is none.

    Args:
        path: The folder or the Lightning checkpoint.

    Raises:
        UserError: If nothing is there or it cannot be read.
    """
    source = _existing(path)
    if source.is_dir():
        file = source / TOKENIZER_FILE
        try:
            return file.read_text(encoding="utf-8") if file.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    tokenizer = _read_lightning(source).get("tokenizer")
    return tokenizer if isinstance(tokenizer, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``, ours or another program's.

    Raises:
        UserError: If there is none or it is not a mapping in JSON.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        run = folder / "checkpoints" / "last.ckpt"
        hint = f"; it is a run folder, so give {run}" if run.is_file() else ""
        raise UserError(f"{folder} holds no model: there is no {CONFIG_FILE} in it{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no mapping of keys to values, and so describes no model")
    return config


def _load_folder(folder: Path) -> MambaLM:
    config = read_config(folder)
    if config.get("format") == _FORMAT:
        with stored_tensors(folder) as readers:
            return _assemble(partial(build, config), readers, folder)
    if is_transformers_mamba(config):
        with stored_tensors(folder) as readers:
            ours = {our_name(name): reader for name, reader in readers.items()}
            return _assemble(lambda: MambaLM(transformers_config(config)), ours, folder)
    kind = "a folder of an unknown kind"
    if "model_type" in config:
        kind = f"a transformers folder of the model type {config['model_type']!r}"
    elif "ssm_cfg" in config:
        kind = "a state-spaces (mamba_ssm) folder"
    raise UserError(f"{folder} is {kind}, which this version does not read; it reads {_READABLE}")


def _read_lightning(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        raise UserError(f"{file} holds tensors without a configuration; give the folder it is in")
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is not a checkpoint of plain tensors and values, and nothing else is opened; give {_READABLE}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no checkpoint, or is damaged or cut short; give {_READABLE}") from error
    if not (isinstance(checkpoint, dict) and "lm" in checkpoint and isinstance(checkpoint.get("state_dict"), dict)):
        raise UserError(f"{file} is a PyTorch file of another program, not of this project; give {_READABLE}")
    return checkpoint


def _assemble(make: Callable[[], MambaLM], readers: Mapping[str, Reader], source: Path) -> MambaLM:
    try:
        with torch.device("meta"):
            lm = make()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    targets, aliases = _stored(lm), _aliases(lm)
    found: dict[str, Reader] = {}
    for name, read in readers.items():
        first = found.setdefault(aliases.get(name, name), read)
        if first is not read and not torch.equal(first(), read()):
            raise UserError(
                f"{source} says that {name} is tied to {aliases.get(name, 'another')} and holds both, unequal"
            )
    tensors: dict[str, Tensor] = {}
    wrong = []
    for name in targets.keys() & found.keys():
        tensor = found[name]()
        if tensor.shape != targets[name].shape or tensor.is_floating_point() != targets[name].is_floating_point():
            wrong.append(f"{name} {_kind(tensor)} instead of {_kind(targets[name])}")
        else:
            tensors[name] = tensor.clone()
    faults = {
        "lacks": sorted(targets.keys() - found.keys()),
        "has the unknown": sorted(found.keys() - targets.keys()),
        "has in the wrong shape or type": sorted(wrong),
    }
    if any(faults.values()):
        told = "; ".join(f"{fault} {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{source} does not hold the tensors of the model it describes: it {told}")
    _fill(lm, tensors)
    return lm


def _stored(lm: nn.Module) -> dict[str, Tensor]:
    """Return what is saved of a model: its state, tied tensors under their first name only."""
    aliases = _aliases(lm)
    return {name: tensor for name, tensor in lm.state_dict(keep_vars=True).items() if name not in aliases}


def _aliases(lm: nn.Module) -> dict[str, str]:
    """Return the later names of tied parameters, each with the first."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in lm.named_parameters(remove_duplicate=False)
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
            if buffer is not None:
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
