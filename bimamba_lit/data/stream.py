"""Training text tokenized and packed as it is read, with nothing on disk.

The text's shards (files, or the parts in which a hub data set is stored) are shuffled anew for every epoch, and spread
over processes and data workers. Within a shard the order stays: a shuffle buffer would be lost when a run is resumed,
and filled with other rows than before. What resumes exactly is the position: the shard, how many pieces of it were
read, and the ids read but not yet given out.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bimamba_lit.data.blocks import IGNORED
from bimamba_lit.data.sources import Part, pieces
from bimamba_lit.data.tokenizer import TextTokenizer
from bimamba_lit.data.worker_signals import StatefulShieldedLoader
from bimamba_lit.errors import UserError


class StreamLoader(StatefulShieldedLoader):
    """A loader of `StreamBlocks` whose state is that of all processes, since each reads shards of its own.

    Every process of the run has to take the state at the same point.
    """

    def __len__(self) -> int:
        """Return a number that is never reached.

        Of a loader without one Lightning reads a batch ahead, to know which is the last,
        and that batch would be missing from a resumed run.
        """
        return sys.maxsize

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes."""
        states: list[Any] = [super().state_dict()]
        if self.dataset.ranks > 1:
            own, states = states[0], [None] * self.dataset.ranks
            torch.distributed.all_gather_object(states, own)
        return {"processes": states, "workers": self.num_workers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            UserError: If it is that of another number of processes, or of workers.
        """
        states, workers = state_dict.get("processes", [state_dict]), state_dict.get("workers", self.num_workers)
        if workers != self.num_workers:
            raise UserError(
                f"the checkpoint is from {workers!r} data workers, each at a place of its own in the streamed text, "
                f"and here are {self.num_workers}: set data.workers to {workers!r}"
            )
        if len(states) != self.dataset.ranks:
            raise UserError(
                f"the checkpoint is from {len(states)} processes, each at a place of its own in the streamed text, "
                f"and here are {self.dataset.ranks}: set trainer.devices to {len(states)}"
            )
        super().load_state_dict(states[self.dataset.rank])


_NOTHING: NDArray[np.int64] = np.zeros(0, np.int64)


class StreamBlocks(IterableDataset[dict[str, Tensor]]):
    """Endless blocks of L+1 ids that overlap by one, as `TrainBlocks` gives them, epoch after epoch.

    Args:
        shards: The text, each read in order by one worker of one process.
        tokenizer: Makes the ids.
        context: L.
        seed: Chooses the order of shards.
        document_end: A line that ends a document within a text file.
        separate: Whether items hold ``seq_idx`` and no token is predicted from another document.
        ranks: Processes that share the text.
        rank: Which of them this is.
    """

    def __init__(
        self,
        shards: Sequence[Part],
        tokenizer: TextTokenizer,
        context: int,
        seed: int,
        document_end: str | None = None,
        separate: bool = False,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.shards = list(shards)
        self.tokenizer = tokenizer
        self.context = context
        self.seed = seed
        self.document_end = document_end
        self.separate = separate
        self.ranks, self.rank = ranks, rank
        self._restart()

    def _restart(self) -> None:
        self._epoch = self._shard = self._pieces = 0
        self._document = -1  # of the shard's, the last one read
        self._ids, self._starts = _NOTHING, _NOTHING  # read and not given out; 1 where a document begins

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,
            "pieces": self._pieces,
            "document": self._document,
            "ids": self._ids.tolist(),
            "starts": self._starts.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        self._epoch, self._shard = state["epoch"], state["shard"]
        self._pieces, self._document = state["pieces"], state["document"]
        self._ids, self._starts = (np.array(state[key], np.int64) for key in ("ids", "starts"))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield blocks without end.

        Raises:
            UserError: If there are fewer shards than workers, or the text has no tokens.
        """
        while True:
            own = self._own_shards()
            given = False
            while self._shard < len(own):
                for block in self._blocks(own[self._shard]):
                    given = True
                    yield block
                self._shard, self._pieces, self._document = self._shard + 1, 0, -1
            if not given and not len(self._ids):
                raise UserError("train: the streamed text has no tokens")
            self._epoch, self._shard = self._epoch + 1, 0

    def _own_shards(self) -> list[Part]:
        worker = get_worker_info()
        workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        shares = self.ranks * workers
        if len(self.shards) < shares:
            raise UserError(
                f"train: the streamed text has {len(self.shards)} files or shards for {shares} readers "
                f"({self.ranks} processes with {workers} workers each): set fewer workers, or split the text"
            )
        order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self.shards))
        return [self.shards[i] for i in order[self.rank * workers + index :: shares]]

    def _blocks(self, shard: Part) -> Iterator[dict[str, Tensor]]:
        whole = not self.tokenizer.splits_at_words()
        read = pieces([shard], self.document_end, whole_documents=whole)
        for number, piece in enumerate(read):
            if number >= self._pieces:
                self._take(piece["document"], self.tokenizer.encode_batch([piece["text"]])[0])
                self._pieces += 1
            yield from self._full_blocks()

    def _take(self, document: int, ids: NDArray[np.int64]) -> None:
        if not len(ids):
            return
        starts = np.zeros(len(ids), np.int64)
        if document != self._document:
            if self.tokenizer.separator is not None:
                ids, starts = np.append(self.tokenizer.separator, ids), np.append(0, starts)
            starts[0] = 1
        self._document = document
        self._ids, self._starts = np.append(self._ids, ids), np.append(self._starts, starts)

    def _full_blocks(self) -> Iterator[dict[str, Tensor]]:
        while len(self._ids) > self.context:
            block = torch.from_numpy(self._ids[: self.context + 1].copy())
            starts = torch.from_numpy(self._starts[: self.context + 1].copy())
            self._ids, self._starts = self._ids[self.context :], self._starts[self.context :]
            yield self._item(block, starts)

    def _item(self, block: Tensor, starts: Tensor) -> dict[str, Tensor]:
        item = {"input_ids": block[:-1], "labels": block[1:]}
        if not self.separate:
            return item
        separator = self.tokenizer.separator
        crossing = starts[1:].bool() & (block[1:] != (-1 if separator is None else separator))
        return item | {
            "labels": block[1:].masked_fill(crossing, IGNORED),
            "seq_idx": (starts.cumsum(0) - starts[0])[:-1].to(torch.int32),
        }


def refuse_shuffle_buffer(loader: Any) -> None:
    """Raise if a loader reads a streamed data set of `datasets` through its shuffle buffer.

    Raises:
        UserError: If it does: a resumed run would begin with the buffer empty and see other rows.
    """
    places: list[Any] = [getattr(getattr(loader, "dataset", None), "_ex_iterable", None)]
    while places:
        place = places.pop()
        if type(place).__name__ == "BufferShuffledExamplesIterable":
            raise UserError(
                f"the training data go through shuffle(buffer_size={place.buffer_size}) of `datasets`, whose buffer a "
                "resumed run would lose: shuffle the order of its shards as TextDataModule's streaming does, "
                "or the rows before they are streamed"
            )
        places += [one for one in (getattr(place, "ex_iterable", None), *getattr(place, "ex_iterables", [])) if one]
