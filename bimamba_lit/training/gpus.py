"""GPUs for processes that run at once: each is given one, so that all GPUs have equally many."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them; CUDA is not initialized by it."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return [str(i) for i in range(count)] if named is None else [gpu.strip() for gpu in named.split(",")][:count]


class Gpus:
    """Lends GPUs to processes.

    Args:
        names: As ``CUDA_VISIBLE_DEVICES`` names them; none where there are none to lend.
    """

    def __init__(self, names: list[str]) -> None:
        self._users = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, trainer: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """Lend the GPU that the fewest use, or all to a recipe that does not ask for one device; yield the environment.

        Args:
            trainer: The recipe's settings of the trainer.
        """
        with self._lock:
            names = sorted(self._users, key=self._users.__getitem__)
            names = names[:1] if str(trainer.get("devices")) == "1" else list(self._users)
            for name in names:
                self._users[name] += 1
        try:
            yield {VISIBLE: ",".join(names)} if names else {}
        finally:
            with self._lock:
                for name in names:
                    self._users[name] -= 1
