"""Trading time for memory: activations inside a block are computed again in the backward pass."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bimamba_lit.models.lm import Block


def checkpoint_blocks_(lm: nn.Module) -> None:
    """Keep only the residual stream between blocks for the backward pass, in place; loss and gradients stay the same.

    Names in the state dict stay too, since it is each block's ``forward`` that is replaced. No block draws random
    numbers, so no random state is kept.
    """
    for block in [child for child in lm.modules() if isinstance(child, Block)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
