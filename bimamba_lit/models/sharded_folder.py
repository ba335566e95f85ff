"""Sharded checkpoints: the folders of torch's distributed checkpoint that Lightning's ``ModelParallelStrategy`` writes.

Each process of a run writes its part of every tensor (``*.distcp``), the first one also says where they lie
(``.metadata``) and what is no tensor (``meta.pt``). Read here by one process, on any machine.

``.metadata`` is a pickle, and torch opens it as one. Here only the few classes that it consists of can come out of it;
a run that is resumed reads it with torch itself, so :func:`check_sharded` looks at it before.
"""

import importlib
import pickle
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.models.plain_pickle import check_plain, load_plain

_META, _INDEX = "meta.pt", ".metadata"
_WHOLE = "a whole sharded checkpoint, with meta.pt, .metadata and the .distcp files of every process"
_STATE = "state_dict."
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "collections": ("OrderedDict",),
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")  # where the checkpoint was written


def is_sharded(path: Path) -> bool:
    """Say whether a path is a sharded checkpoint, whole or not."""
    return path.is_dir() and ((path / _META).is_file() or (path / _INDEX).is_file())


def load_meta(folder: Path) -> dict[str, Any]:
    """Return what a sharded checkpoint holds beside tensors: what Lightning's checkpoints do, without ``state_dict``.

    Raises:
        UserError: If it is not whole, or holds more than plain values.
    """
    for name in (_META, _INDEX):
        if not (folder / name).is_file():
            raise UserError(f"{folder} was not written to its end, it lacks {name}; give {_WHOLE}")
    meta = load_plain(folder / _META, _WHOLE)
    if not isinstance(meta, dict):
        raise UserError(f"{folder / _META} holds no mapping of names to values; give {_WHOLE}")
    return meta


def load_state(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the model in a sharded checkpoint, whole and on the CPU, by its name in ``state_dict``.

    Raises:
        UserError: If the checkpoint is not whole, is damaged, or holds more than plain tensors.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    index = _checked_index(folder)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(_STATE) and hasattr(entry, "properties")
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=Reader(folder), no_dist=True)
    except Exception as error:  # a damaged file fails in as many ways as there are to read it
        raise UserError(f"{folder} is damaged; save or copy it again, or give {_WHOLE}") from error
    return {name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}


def check_sharded(folder: Path) -> None:
    """Refuse a sharded checkpoint that is not whole, or that holds more than plain tensors and values.

    Raises:
        UserError: If so.
    """
    load_meta(folder)
    index = _checked_index(folder)
    for key, where in index.storage_data.items():
        if hasattr(index.state_dict_metadata[key.fqn], "properties"):
            continue  # a tensor, which torch reads as nothing else
        with (folder / where.relative_path).open("rb") as file:
            file.seek(where.offset)
            value = file.read(where.length)
        try:
            check_plain(value)
        except Exception as error:
            raise UserError(f"{folder} holds {key.fqn}, which is no plain value; give {_WHOLE}") from error


def _checked_index(folder: Path) -> Any:
    """Return the content of ``.metadata`` if the files beside it are as long as it says."""
    try:
        with (folder / _INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        parts = [(str(where.relative_path), where.offset, where.length) for where in index.storage_data.values()]
        asked = sum(
            entry.size.numel() * entry.properties.dtype.itemsize
            for entry in index.state_dict_metadata.values()
            if hasattr(entry, "properties")
        )
        known = {key.fqn for key in index.storage_data} <= index.state_dict_metadata.keys()
    except UserError as error:
        raise UserError(f"{folder / _INDEX} {error}; give {_WHOLE}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"{folder / _INDEX} is damaged; save or copy it again, or give {_WHOLE}") from error
    for name, offset, length in parts:
        part = folder / name
        if Path(name).name != name or not part.is_file() or not 0 <= offset <= offset + length <= part.stat().st_size:
            raise UserError(f"{folder} is not whole: {name} is missing or cut short; give {_WHOLE}")
    if not known or asked > sum(length for *_, length in parts):
        raise UserError(f"{folder / _INDEX} tells of more tensors than the files hold; give {_WHOLE}")
    return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _PATHS and module.split(".")[0] == "pathlib":
            return _path
        if name in _CLASSES.get(module, ()):
            return _found(module, name)
        raise UserError(f"holds {module}.{name}, which is no part of a checkpoint")


def _path(*parts: str) -> str:
    return "/".join(parts)


@cache
def _found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
