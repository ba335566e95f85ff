"""A token stream as training blocks and as evaluation windows.

Legend: L context length, S stride, N ids in the stream.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from bimamba_lit.data.tokens import NOT_A_TARGET, TokenStream

IGNORED = -100


class TrainBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of L+1 ids that overlap by one, so that every id but the stream's first is predicted once.

    A last partial block is dropped. An item holds ``input_ids`` (L,) and ``labels`` (L,), both int64.
    """

    def __init__(self, stream: TokenStream, context: int) -> None:
        self.stream = stream
        self.context = context

    def __len__(self) -> int:
        return max(0, self.stream.length - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        block = torch.from_numpy(self.stream.tokens[start : start + self.context + 1].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}


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
    """

    def __init__(self, stream: TokenStream, context: int, stride: int, multiple_of: int = 1) -> None:
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
        return {
            "input_ids": self._padded(inputs, 0),
            "labels": self._padded(np.where(counted, targets, IGNORED), IGNORED),
            "label_bytes": self._padded(np.where(counted, sizes, 0), 0),
        }

    def _padded(self, values: NDArray[np.int64], filler: int) -> Tensor:
        return torch.from_numpy(np.pad(values, (0, self.context - len(values)), constant_values=filler))


class EpochOrder(StatefulDistributedSampler):
    """A rank's share of an order shuffled anew from seed and epoch, which resumes in the right epoch.

    Lightning restores the loader, and workers begin to fetch, before it tells the sampler which epoch it is; so the
    epoch is part of the state. Ranks have equal shares: of N blocks the last N modulo ranks of the order are left out
    of an epoch.
    """

    def __init__(self, blocks: TrainBlocks, seed: int, ranks: int = 1, rank: int = 0) -> None:
        # The order is seeded with seed + epoch: seeds far apart keep the epochs of one from being those of another.
        super().__init__(blocks, num_replicas=ranks, rank=rank, shuffle=True, seed=seed << 20, drop_last=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and how many indices it has given."""
        return {**super().state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        super().load_state_dict(state_dict)
        self.set_epoch(state_dict["epoch"])
