"""Writing a teacher's distributions to disk, a shard at a time.

A shard is written aside and moved into place, and what is in it depends on nothing but the teacher and its sequences:
a command that was killed and is started again goes on with the first shard that is not there. Several processes may
run the same command: each takes shards that no other holds.

Legend: n tokens, D width, V vocabulary, L context, k tokens kept.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bimamba_lit.distill.stored_teacher import Manifest, is_stored_teacher, read_manifest, shard_file, write_shard
from bimamba_lit.errors import UserError
from bimamba_lit.files import remove_partial, replacing

SHARD_BYTES = 64 << 20
"""Bytes of a shard before compression, which a killed command may have to do again."""

_CHUNK_TOKENS = 1024

Batch = dict[str, Tensor]
Stored = tuple[np.ndarray, np.ndarray]


def bytes_a_token(top_k: int, vocab_size: int) -> int:
    """Return the bytes that one position takes before compression."""
    return top_k * _id_type(vocab_size).itemsize + (top_k + 1) * 2


def sequences_a_shard(top_k: int, vocab_size: int, context: int) -> int:
    """Return how many sequences make a shard of about `SHARD_BYTES`."""
    return max(1, SHARD_BYTES // (context * bytes_a_token(top_k, vocab_size)))


def sha256_of(teacher: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors, their names and types, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@torch.no_grad()
def likeliest(hidden: Tensor, head: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return a teacher's likeliest tokens (n, k), by rising id, and log-probabilities of them and the rest (n, k + 1).

    Args:
        hidden: Its final hidden states (n, D).
        head: Its output embedding (V, D).
        top_k: k, at most V; at V the rest is -inf.
        temperature: Divides the logits.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for part in hidden.split(_CHUNK_TOKENS):
        logits = (part @ head.t()).float() / temperature
        ids = logits.topk(top_k, -1).indices.sort(-1).values
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        found.append((ids, torch.cat([logits.gather(1, ids), rest], 1) - logits.logsumexp(-1, keepdim=True)))
    ids, log_probs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, log_probs


def store_teacher(
    teacher: Any,
    batches: Callable[[range], Iterator[Batch]],
    folder: Path,
    manifest: Manifest,
    precision: Callable[[], AbstractContextManager[Any]],
) -> bool:
    """Write the shards that are not there yet, telling what is done.

    Args:
        teacher: With ``backbone`` and ``head_weight``, frozen.
        batches: Gives the sequences of those numbers, in order, as batches on the teacher's device.
        folder: Where to.
        manifest: What is to be there.
        precision: Makes the context of a forward pass.

    Returns:
        Whether all shards are there: False where other processes still write some.

    Raises:
        UserError: If the folder holds something else, the disk is too small or cannot be written, or the teacher's
            logits are not finite.
    """
    from filelock import FileLock, Timeout

    _take_folder(folder, manifest)
    to_do = [shard for shard in range(manifest.shards) if not shard_file(folder, shard).is_file()]
    if len(to_do) < manifest.shards:
        print(f"{folder} has {manifest.shards - len(to_do)} of {manifest.shards} shards: going on", flush=True)
    space_is_checked = False
    for shard in to_do:
        file = shard_file(folder, shard)
        try:
            with FileLock(folder / f".{file.name}.lock", blocking=False):
                if file.is_file():  # another process has just written it
                    continue
                remove_partial(folder, file.name)
                stored = _stored(teacher, batches(manifest.sequences_of(shard)), manifest, precision)
                first = next(stored)
                if not space_is_checked:
                    _check_space(folder, manifest, first, sum(len(manifest.sequences_of(one)) for one in to_do))
                    space_is_checked = True
                with replacing(file) as path:
                    write_shard(str(path), chain([first], stored), manifest.top_k, first[0].dtype)
                print(f"{file.name} written, of {manifest.shards} shards", flush=True)
        except Timeout:
            print(f"{file.name} is being written by another process", flush=True)
    done = all(shard_file(folder, shard).is_file() for shard in range(manifest.shards))
    if done:
        for lock in folder.glob(".shard-*.lock"):
            lock.unlink(missing_ok=True)
    return done


def _take_folder(folder: Path, manifest: Manifest) -> None:
    if is_stored_teacher(folder):
        there, wanted = vars(read_manifest(folder)), vars(manifest)
        differing = [key for key, value in wanted.items() if there[key] != value and key != "teacher"]
        if differing:
            raise UserError(f"{folder} holds a teacher's logits of another {differing[0]}: give another --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and holds no teacher's logits: give another --out")
    else:
        manifest.write(folder)


def _stored(
    teacher: Any, batches: Iterator[Batch], manifest: Manifest, precision: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Stored]:
    """Yield ids (L, k) and log-probabilities (L, k + 1) of each sequence, as they are stored."""
    for batch in batches:
        with torch.no_grad(), precision():
            hidden = teacher.backbone(batch["input_ids"], seq_idx=batch.get("seq_idx")).flatten(0, 1)
            ids, log_probs = likeliest(hidden, teacher.head_weight, manifest.top_k, manifest.temperature)
        if not log_probs[:, :-1].isfinite().all():
            raise UserError(f"the teacher's logits are not finite in the sequences {batch['sequence'].tolist()}")
        ids, log_probs = ids.cpu(), log_probs.cpu().half()
        for own_ids, own in zip(ids.split(manifest.context), log_probs.split(manifest.context), strict=True):
            yield own_ids.numpy().astype(_id_type(manifest.vocab_size)), own.numpy()


def _check_space(folder: Path, manifest: Manifest, first: Stored, sequences: int) -> None:
    """Tell what the sequences to be written will take, going by the first, and refuse if the disk has less."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    write_shard(sink, [first], manifest.top_k, first[0].dtype)
    each = len(sink.getvalue()) / manifest.context
    tokens = sequences * manifest.context
    needed, free = each * tokens, shutil.disk_usage(folder).free
    raw = bytes_a_token(manifest.top_k, manifest.vocab_size)
    print(
        f"top {manifest.top_k} of {manifest.vocab_size:,}: about {each:.0f} bytes a token ({raw} before compression), "
        f"{needed / 1e9:.3g} GB for {tokens:,} tokens; {free / 1e9:.3g} GB are free",
        flush=True,
    )
    if needed > free:
        raise UserError(
            f"{folder} needs about {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left: give another --out "
            "or a smaller --top_k"
        )


def _id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
