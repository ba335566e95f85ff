"""The tensors of a folder: one ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bimamba_lit.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Reader = Callable[[], Tensor]


@contextmanager
def stored_tensors(folder: Path) -> Iterator[dict[str, Reader]]:
    """Yield what reads each tensor of a folder, by name; tensors lie in the memory-mapped files until copied.

    Raises:
        UserError: If there are no safetensors, a shard is missing or lies elsewhere, or a file is damaged or cut short.
    """
    with ExitStack() as stack:
        readers: dict[str, Reader] = {}
        for file, names in _files(folder).items():
            weights = stack.enter_context(_opened(file))
            held = list(weights.keys())
            if names is not None and (lacking := sorted(set(names) - set(held))):
                raise UserError(f"{file} lacks {lacking[0]}, which {INDEX_FILE} says it holds; copy both again")
            readers |= {name: partial(weights.get_tensor, name) for name in names or held}
        yield readers


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Return the files of a folder and the names that each is said to hold, None where it is all there is."""
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f", only {pickled[0]}, a pickle, which is not opened" if pickled else ""
        raise UserError(f"{folder} has a config.json and no {WEIGHTS_FILE}{hint}; save the model again as safetensors")
    files: dict[Path, list[str] | None] = {}
    for name, shard in _weight_map(index).items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index} says that {name} is in {shard!r}, which is not the name of a file beside it")
        held = files.setdefault(folder / shard, [])
        assert held is not None
        held.append(name)
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks the shard {file.name}, one of {len(files)}; copy it there")
    return files


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{index} is not readable JSON of an index of shards: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no 'weight_map', which says the shard of each tensor")
    return weight_map


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); save or copy it again") from error
