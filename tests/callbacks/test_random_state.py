import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bimamba_lit.callbacks import RandomState


def drawn() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_what_is_saved_draws_the_same_numbers_again() -> None:
    trainer: Any = SimpleNamespace(sanity_checking=False)
    saved = RandomState().state_dict()
    numbers = drawn()
    resumed = RandomState()
    resumed.load_state_dict(saved)
    assert drawn() != numbers, "loaders are built first, and draw numbers of their own"
    resumed.on_train_batch_start(trainer, trainer, None, 0)
    assert drawn() == numbers
    resumed.on_train_batch_start(trainer, trainer, None, 1)
    assert drawn() != numbers


def test_within_a_validation_the_state_before_it_is_saved() -> None:
    trainer: Any = SimpleNamespace(sanity_checking=False)
    state = RandomState()
    before = torch.get_rng_state()
    state.on_validation_start(trainer, trainer)
    drawn()
    (saved,) = state.state_dict()["ranks"]
    assert torch.equal(saved["torch"], before)
    state.on_validation_end()
    (saved,) = state.state_dict()["ranks"]
    assert torch.equal(saved["torch"], torch.get_rng_state()) and not torch.equal(saved["torch"], before)
