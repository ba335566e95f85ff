"""The tensors of a folder: safetensors or PyTorch's own file, in one piece or in the shards that an index lists.

A safetensors file of this project carries a checksum of every tensor, so that a flipped bit is told instead of computed
with.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.models.plain_pickle import load_plain

WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"

Reader = Callable[[], Tensor]

_CHECKSUMS = "crc32"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def stored_tensors(folder: Path) -> Iterator[dict[str, Reader]]:
    """Yield what reads each tensor of a folder, by name; tensors lie in the memory-mapped files until copied.

    Raises:
        UserError: If there are no weights, a shard is missing or lies elsewhere, or a file is damaged or cut short.
    """
    with ExitStack() as stack:
        readers: dict[str, Reader] = {}
        for file, names in _files(folder).items():
            opened = _pickle(file) if file.suffix == ".bin" else _safetensors(file)
            held = stack.enter_context(opened)
            if names is not None and (lacking := sorted(set(names) - set(held))):
                raise UserError(f"{file} lacks {lacking[0]}, which the index beside it says it holds; copy both again")
            readers |= {name: held[name] for name in names or held}
        yield readers


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors and their checksums as one safetensors file.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sums = json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})
    try:
        save_file(dict(tensors), file, metadata={"format": "pt", _CHECKSUMS: sums})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def is_plain_float(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a type that models compute in: fp16, bf16, fp32 or fp64."""
    return tensor.dtype in _FLOATS


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Return the files of a folder and the names that each is said to hold, None where it is all there is."""
    for name in (WEIGHTS_FILE, PICKLE_FILE):
        if (folder / name).is_file():
            return {folder / name: None}
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    raise UserError(f"{folder} has a config.json and no weights: neither {WEIGHTS_FILE} nor {PICKLE_FILE} is in it")


def _shards(index: Path) -> dict[Path, list[str] | None]:
    files: dict[Path, list[str] | None] = {}
    for name, shard in _weight_map(index).items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or Path(shard).suffix not in (".safetensors", ".bin")
        ):
            raise UserError(f"{index} says that {name} is in {shard!r}, which is not the name of a file beside it")
        held = files.setdefault(index.parent / shard, [])
        assert held is not None
        held.append(name)
    for file in files:
        if not file.is_file():
            raise UserError(f"{index.parent} lacks the shard {file.name}, one of {len(files)}; copy it there")
    return files


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not readable JSON of an index of shards: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no 'weight_map', which says the shard of each tensor")
    return weight_map


@contextmanager
def _pickle(file: Path) -> Iterator[dict[str, Reader]]:
    content = load_plain(file, "weights saved by torch.save(model.state_dict())")
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{file} holds no mapping of names to tensors, as torch.save(model.state_dict()) writes")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{file} holds {name}, which is not a tensor with values")
    yield {name: partial(_itself, tensor) for name, tensor in content.items()}


@contextmanager
def _safetensors(file: Path) -> Iterator[dict[str, Reader]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            sums = _checksums(file, weights.metadata() or {}, set(weights.keys()))
            yield {name: partial(_checked, file, weights, name, sums.get(name)) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); save or copy it again") from error


def _checksums(file: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, int]:
    """Return the checksums a file carries: of every tensor, or of none."""
    under_another_name = any(f'"{name}"' in text for text in metadata.values() for name in names)
    if _CHECKSUMS not in metadata and not under_another_name:
        return {}
    try:
        sums = json.loads(metadata.get(_CHECKSUMS, ""))
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or sums.keys() != names:
        raise UserError(f"{file} is damaged: its list of checksums is broken; save or copy it again")
    return sums


def _checked(file: Path, weights: Any, name: str, expected: int | None) -> Tensor:
    tensor: Tensor = weights.get_tensor(name)
    if expected is not None and _checksum(tensor) != expected:
        raise UserError(f"{file} is damaged: the values of {name} do not have their checksum; save or copy it again")
    return tensor


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(cast(Any, values.numpy()))


def _itself(tensor: Tensor) -> Tensor:
    return tensor
