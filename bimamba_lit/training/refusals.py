"""What a run is refused for before it begins, though its recipe names right keys and values."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from bimamba_lit.errors import UserError
from bimamba_lit.models.checkpoint import read_lightning
from bimamba_lit.models.sharded_folder import check_sharded, is_sharded


def refuse_twice(callbacks: list[pl.Callback]) -> None:
    """Raise where two callbacks would keep their state in one place of a checkpoint.

    Raises:
        UserError: If so.
    """
    kept = Counter(one.state_key for one in callbacks if type(one).state_dict is not pl.Callback.state_dict)
    for key, times in kept.items():
        if times > 1:
            raise UserError(
                f"trainer.callbacks: {key} is there {times} times, with a recipe's own and those added by +=: name it "
                "once, with all its settings"
            )


def refuse_other_spread(trainer: pl.Trainer) -> None:
    """Raise where sharded weights would be spread over more or fewer devices than there are.

    Raises:
        UserError: If so.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    devices = trainer.num_devices * trainer.num_nodes
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    if isinstance(data, int) and isinstance(tensor, int) and data * tensor != devices:
        raise UserError(
            f"trainer.strategy: data_parallel_size is {data} and tensor_parallel_size {tensor}, where the run has "
            f"{devices} devices in all: set data_parallel_size to {devices} and tensor_parallel_size to 1"
        )


def refuse_unreadable(checkpoint: Path, strategy: Any) -> None:
    """Raise before anything is built where a checkpoint is damaged, foreign, or not for this strategy.

    Raises:
        UserError: If so.
    """
    read_lightning(checkpoint)
    if not is_sharded(checkpoint):
        return
    check_sharded(checkpoint)
    if not str(getattr(strategy, "class_path", strategy)).endswith("ModelParallelStrategy"):
        raise UserError(
            f"{checkpoint} is sharded, and trainer.strategy must be ModelParallelStrategy to load it, on any number of "
            f"devices; or make a model's folder of it: bimamba convert --from {checkpoint} --to FOLDER"
        )
