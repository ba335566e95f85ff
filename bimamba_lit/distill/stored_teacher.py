"""A teacher's distributions on disk: the likeliest tokens of every position of a training text, and the rest's mass.

Arrow files, one record batch a sequence, compressed by zstd, so that any sequence is read by itself and shuffling costs
nothing. Log-probabilities are kept in float16: for the quickstart's teacher 1e-7 nats from the distribution
(KL), where 8 bits would be 7e-5 for 40% less disk. Tokens are sorted by their ids, which compresses better than by
probability.

Legend: B sequences, L context, k tokens kept.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing

MANIFEST = "teacher_logits.json"
_FORMAT = "bimamba-lit teacher logits"
_VERSION = 1
_CHECKSUM = b"crc32"


@dataclass(frozen=True)
class Manifest:
    """What the distributions are of, and how they are stored.

    Attributes:
        teacher: The path or hub name that the teacher was read from.
        teacher_sha256: Of its tensors.
        tokenizer: The data's tokenizer, as JSON.
        data: What the sequences are, as ``TextDataModule.training_data`` tells it.
        vocab_size: Tokens of the vocabulary.
        top_k: Tokens kept of every position.
        temperature: What logits were divided by.
        context: Tokens of a sequence.
        sequences: Number of sequences.
        sequences_a_shard: Sequences in a file, but for the last.
    """

    teacher: str
    teacher_sha256: str
    tokenizer: str
    data: dict[str, Any]
    vocab_size: int
    top_k: int
    temperature: float
    context: int
    sequences: int
    sequences_a_shard: int

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.sequences // self.sequences_a_shard)

    def sequences_of(self, shard: int) -> range:
        """Return the numbers of a shard's sequences."""
        first = shard * self.sequences_a_shard
        return range(first, min(first + self.sequences_a_shard, self.sequences))

    def write(self, folder: Path) -> None:
        """Write the file that a folder is recognised by.

        Raises:
            UserError: If it cannot be written.
        """
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1), "utf-8")


def is_stored_teacher(path: str | Path) -> bool:
    """Say whether ``path`` is a folder of a teacher's distributions."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Return what a folder of distributions says it holds.

    Raises:
        UserError: If its manifest is missing, damaged or of another version.
    """
    file = folder / MANIFEST
    try:
        fields = json.loads(file.read_text("utf-8"))
        if fields.pop("format") != _FORMAT or fields.pop("version") != _VERSION:
            raise UserError(f"{file} is of another version than this release reads: write the teacher's logits again")
        manifest = Manifest(**fields)
        kinds = {**Manifest.__annotations__, "data": dict}
        if any(type(value) is not kinds[name] for name, value in asdict(manifest).items()):
            raise TypeError
        sizes = manifest.vocab_size, manifest.top_k, manifest.context, manifest.sequences, manifest.sequences_a_shard
        if min(sizes) < 1 or manifest.top_k > manifest.vocab_size or not 0 < manifest.temperature < float("inf"):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is no manifest of a teacher's logits, or is damaged: write them again with bimamba teacher-logits"
        ) from error
    return manifest


def shard_file(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{shard:06}.arrow"


class StoredTeacher:
    """A teacher's distributions, read by the numbers of sequences.

    Args:
        folder: A folder that ``bimamba teacher-logits`` wrote.

    Attributes:
        manifest: What it says it holds.
        config: With the ``vocab_size``, as every teacher has it.

    Raises:
        UserError: If it is damaged or not complete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        lacking = [s for s in range(self.manifest.shards) if not shard_file(self.folder, s).is_file()]
        if lacking:
            raise UserError(
                f"{self.folder} lacks {len(lacking)} of its {self.manifest.shards} shards, "
                f"{shard_file(self.folder, lacking[0]).name} first: run bimamba teacher-logits again, which goes on"
            )
        self.config = SimpleNamespace(vocab_size=self.manifest.vocab_size)
        self._reader = lru_cache(maxsize=256)(_open)

    def check(self, data: dict[str, Any], temperature: float) -> None:
        """Hold what is stored to what is to be trained on.

        Args:
            data: What ``TextDataModule.training_data`` tells.
            temperature: Of the loss.

        Raises:
            UserError: If the stored distributions are of other sequences or another temperature.
        """
        stored = self.manifest
        if stored.temperature != temperature:
            raise UserError(
                f"model.temperature is {temperature}, and {self.folder} holds distributions at {stored.temperature}: "
                "set it to that, or write them again"
            )
        differing = [key for key, value in data.items() if stored.data.get(key) != value]
        if differing:
            key = differing[0]
            told = f"{key} is {data[key]!r} here and {stored.data.get(key)!r} there"
            raise UserError(
                f"{self.folder} holds a teacher's logits for other training sequences than the recipe's: {told}"
            )

    def distributions(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens (B, L, k) int32 and their log-probabilities and the rest's (B, L, k + 1) fp16.

        Raises:
            UserError: If a file is damaged, or a sequence is not there.
        """
        read = [self._read(sequence) for sequence in sequences]
        ids, log_probs = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
        return ids, log_probs

    def _read(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        stored = self.manifest
        if not 0 <= sequence < stored.sequences:
            raise UserError(f"{self.folder} has {stored.sequences} sequences and none of number {sequence}")
        shard, row = divmod(sequence, stored.sequences_a_shard)
        file = shard_file(self.folder, shard)
        try:
            batch, metadata = self._reader(file).get_batch_with_custom_metadata(row)
            parts = [column.flatten().to_numpy() for column in batch.columns]
            if int((metadata or {}).get(_CHECKSUM, -1)) != _checksum(parts):
                raise ValueError
            ids = parts[0].reshape(stored.context, stored.top_k).astype(np.int32)
            log_probs = parts[1].reshape(stored.context, stored.top_k + 1)
            if log_probs.dtype != np.float16 or ids.max() >= stored.vocab_size:
                raise ValueError
        except Exception as error:  # pyarrow raises what the damaged bytes happen to ask for
            raise UserError(
                f"{file} is missing, damaged or cut short at sequence {sequence}: remove it and run bimamba "
                "teacher-logits again, which writes it anew"
            ) from error
        return ids, log_probs


def write_shard(sink: Any, sequences: Iterable[tuple[np.ndarray, np.ndarray]], top_k: int, id_type: Any) -> None:
    """Write sequences to a path or a pyarrow stream.

    Args:
        sink: Where to.
        sequences: Of each, ids (L, k) of ``id_type`` and log-probabilities (L, k + 1) in float16.
        top_k: k.
        id_type: NumPy's type of the ids.
    """
    import pyarrow as pa

    widths = {"ids": (pa.from_numpy_dtype(id_type), top_k), "log_probs": (pa.float16(), top_k + 1)}
    schema = pa.schema([pa.field(name, pa.list_(kind, width)) for name, (kind, width) in widths.items()])
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for parts in sequences:
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1]) for part in parts]
            metadata = {_CHECKSUM: str(_checksum(parts)).encode()}
            writer.write_batch(pa.record_batch(columns, schema=schema), custom_metadata=metadata)


def _checksum(parts: Sequence[np.ndarray]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(part.tobytes(), total)
    return total


def _open(file: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(file)))
