from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bimamba_lit import MambaConfig, MambaLM

Make = Callable[..., MambaLM]


@pytest.fixture
def make() -> Make:
    """Build a small model whose every parameter differs from its neighbours and from its initial value."""

    def build(seed: int = 0, **options: object) -> MambaLM:
        torch.manual_seed(seed)
        small = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 16, "chunk_size": 8}
        lm = MambaLM(MambaConfig.from_dict(small | options))
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return lm

    return build


@pytest.fixture
def error() -> Callable[[Tensor, Tensor], float]:
    """Relative error: root mean square of the difference over that of the reference."""
    return lambda value, reference: float((value - reference).detach().norm() / reference.detach().norm())
