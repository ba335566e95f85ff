"""A token stream as training blocks and as evaluation windows.

Legend: L context length, S stride, N ids in the stream.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from bimamba_lit.data.tokens import NOT_A_TARGET, TokenStream
from bimamba_lit.data.worker_signals import StatefulShieldedLoader
from bimamba_lit.errors import UserError

IGNORED = -100


class TrainBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of L+1 ids of several streams, overlapping by one, so that every id but a stream's first is predicted.

    A last partial block of a stream is dropped. An item holds ``input_ids`` (L,) and ``labels`` (L,), both int64,
    ``sequence``, the block's number, an int64 scalar, and where documents are kept apart ``seq_idx`` (L,) int32, the
    number of each token's document; then no token is predicted from another document, unless it is the separator that
    ends one.

    Args:
        streams: Token streams.
        context: L.
        weights: How often an epoch reads each stream; once where none are given.
        separate: Whether documents are kept apart.
        separator: The id between two documents, or None.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        context: int,
        weights: Sequence[float] | None = None,
        separate: bool = False,
        separator: int | None = None,
    ) -> None:
        self.streams = list(streams)
        self.context = context
        self.separate = separate
        self.separator = separator
        self.counts = [max(0, stream.length - 1) // context for stream in streams]
        factors = [1.0] * len(self.counts) if weights is None else list(weights)
        self.visits = [int(count * factor) for count, factor in zip(self.counts, factors, strict=True)]

    def __len__(self) -> int:
        """Return the number of blocks that an epoch reads."""
        return sum(self.visits)

    def block_of(self, visit: int, epoch: int) -> int:
        """Return which block the visit is of: a stream's visits go on where those of the epoch before it stopped."""
        first = 0
        for count, visits in zip(self.counts, self.visits, strict=True):
            if visit < visits:
                return first + (epoch * visits + visit) % count
            first, visit = first + count, visit - visits
        raise IndexError("a visit beyond the end of an epoch")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rest = index
        for stream, count in zip(self.streams, self.counts, strict=True):
            if rest < count:
                return {"sequence": torch.tensor(index), **self._block(stream, rest * self.context)}
            rest -= count
        raise IndexError("a block beyond the end of the streams")

    def _block(self, stream: TokenStream, start: int) -> dict[str, Tensor]:
        block = torch.from_numpy(stream.tokens[start : start + self.context + 1].astype(np.int64))
        item = {"input_ids": block[:-1], "labels": block[1:]}
        if not self.separate:
            return item
        documents = document_numbers(stream, start, self.context + 1)
        crossing = (documents[1:] != documents[:-1]) & (block[1:] != (-1 if self.separator is None else self.separator))
        return {
            "input_ids": block[:-1],
            "labels": block[1:].masked_fill(crossing, IGNORED),
            "seq_idx": documents[:-1].clone(),
        }


def document_numbers(stream: TokenStream, start: int, count: int) -> Tensor:
    """Return the number of the document of each id from ``start`` on, (count,) int32, the first one's 0."""
    numbers = np.searchsorted(stream.starts, np.arange(start, start + count), side="right")
    return torch.from_numpy((numbers - numbers[0]).astype(np.int32))


class EvalWindows(Dataset[dict[str, Tensor]]):
    """Windows of L ids, S apart, in which each text token except a document's first is a label exactly once.

    The first window counts all its labels, later ones their last S. Separators are never counted. An item holds
    ``input_ids`` (L,), ``labels`` (L,) with -100 where not counted, and ``label_bytes`` (L,), the UTF-8 bytes that a
    counted label stands for, else 0; all int64.

    Args:
        stream: A sized token stream.
        context: L.
        stride: S, at most L.
        multiple_of: The number of windows is rounded up to a multiple of this with windows that count nothing, so that
            as many processes can share them evenly with none repeated.
        separate: Whether items also hold ``seq_idx`` (L,) int32, the number of each token's document.
    """

    def __init__(
        self, stream: TokenStream, context: int, stride: int, multiple_of: int = 1, separate: bool = False
    ) -> None:
        self.separate = separate
        self.stream = stream
        self.context = context
        self.stride = stride
        self.multiple_of = multiple_of

    @property
    def targets(self) -> int:
        """Number of labels that count, in all windows."""
        return int(np.count_nonzero(self.stream.sizes[1:] != NOT_A_TARGET))

    def __len__(self) -> int:
        beyond_first = max(0, self.stream.length - 1 - self.context)
        windows = 1 + -(-beyond_first // self.stride)
        return -(-windows // self.multiple_of) * self.multiple_of

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.stride
        stop = start + self.context
        tokens = self.stream.tokens[start : stop + 1].astype(np.int64)
        inputs, targets = tokens[: self.context], tokens[1:]
        sizes = self.stream.sizes[start + 1 : stop + 1].astype(np.int64)
        counted = sizes != NOT_A_TARGET
        if index > 0:
            counted[: self.context - self.stride] = False
        apart = {"seq_idx": document_numbers(self.stream, start, self.context)} if self.separate else {}
        return apart | {
            "input_ids": self._padded(inputs, 0),
            "labels": self._padded(np.where(counted, targets, IGNORED), IGNORED),
            "label_bytes": self._padded(np.where(counted, sizes, 0), 0),
        }

    def _padded(self, values: NDArray[np.int64], filler: int) -> Tensor:
        return torch.from_numpy(np.pad(values, (0, self.context - len(values)), constant_values=filler))


class SeparateWindows(Dataset[dict[str, Tensor]]):
    """Windows of L ids one after another, each predicted from itself alone, as quantization papers evaluate.

    A window predicts all its ids but the first, and a last partial window is dropped (GPTQ, arXiv 2210.17323, and those
    that compare with it). Items are as those of `EvalWindows`; a document's first token counts like any other.

    Args:
        stream: A sized token stream of one document.
        context: L, at least 2.
    """

    def __init__(self, stream: TokenStream, context: int) -> None:
        self.stream = stream
        self.context = context

    def __len__(self) -> int:
        return self.stream.length // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = slice(index * self.context, (index + 1) * self.context)
        ids, sizes = (
            torch.from_numpy(values[window].astype(np.int64)) for values in (self.stream.tokens, self.stream.sizes)
        )
        labels, label_bytes = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        labels[:-1], label_bytes[:-1] = ids[1:], sizes[1:]
        return {"input_ids": ids, "labels": labels, "label_bytes": label_bytes}


class EpochOrder(StatefulDistributedSampler):
    """A rank's share of an order shuffled anew from seed and epoch, which resumes in the right epoch.

    Blocks have weights: an order is of visits, and `TrainBlocks.block_of` says which block each is of.

    Lightning restores the loader, and workers begin to fetch, before it tells the sampler which epoch it is; so the
    epoch is part of the state. Ranks have equal shares: of N blocks the last N modulo ranks of the order are left out
    of an epoch.
    """

    def __init__(self, blocks: TrainBlocks, seed: int, ranks: int = 1, rank: int = 0) -> None:
        # The order is seeded with seed + epoch: seeds far apart keep the epochs of one from being those of another.
        super().__init__(blocks, num_replicas=ranks, rank=rank, shuffle=True, seed=seed << 20, drop_last=True)
        self.blocks = blocks

    def __iter__(self) -> Iterator[int]:
        """Yield the blocks of the epoch."""
        epoch = self.epoch
        for visit in super().__iter__():
            yield self.blocks.block_of(visit, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many indices each rank was given, and how many ranks there are."""
        return {**super().state_dict(), "epoch": self.epoch, "ranks": self.num_replicas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken, be it by another number of ranks.

        Raises:
            UserError: If it is none, or the ranks cannot share what was given, so that some would be given twice or
                never.
        """
        numbers = [state_dict.get(key) for key in (self._YIELDED, "epoch", "ranks")]
        if not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers) or not numbers[-1]:
            raise UserError(
                "the checkpoint's place in the training text is damaged or of another version: it must be numbers, of "
                f"{self._YIELDED}, epoch and ranks"
            )
        ranks = state_dict["ranks"]
        given = state_dict[self._YIELDED] * ranks
        if given % self.num_replicas:
            raise UserError(
                f"the checkpoint is from {ranks} processes that had read {given} sequences, which {self.num_replicas} "
                "cannot share evenly: keep trainer.devices times data.batch_size as it was"
            )
        super().load_state_dict({self._YIELDED: given // self.num_replicas})
        self.set_epoch(state_dict["epoch"])


class BlockLoader(StatefulShieldedLoader):
    """A loader of `TrainBlocks` in an `EpochOrder`, whose state is its place in that: the same for any worker count.

    torchdata's own state holds one of each worker, and is refused by another number of them.
    """

    sampler: EpochOrder
    _before = 0
    """Sequences of the epoch that were given before the iterator began: by the process that the state is of."""

    def __iter__(self) -> Any:
        """Begin an epoch, or go on in the one that the state is of."""
        self._before = self.sampler.next_yielded or 0
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return how many sequences of which epoch were given, not counting what workers have fetched ahead."""
        if self._iterator is None:
            return {**self.sampler.state_dict(), EpochOrder._YIELDED: self.sampler.next_yielded or 0}
        given = self._before + self._iterator._num_yielded * (self.batch_size or 1)
        return {**self.sampler.state_dict(), EpochOrder._YIELDED: min(given, self.sampler.num_samples)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        super().load_state_dict({})
        self.sampler.load_state_dict(state_dict)
