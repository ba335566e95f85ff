"""What is done to the blocks of a model in training, in place, by recipe: neither changes a name in the state dict.

Both replace a block's ``forward`` alone, so that hooks around the block (FSDP2 gathers its weights in one) stay outside
of what is compiled or run again.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bimamba_lit.models.lm import Block

_FORMS = 64


def compile_blocks_(lm: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward pass of every block with ``torch.compile``: once for all blocks of a kind.

    Args:
        lm: The model.
        backend: A compiler by the name that ``torch.compile`` has for it.
    """
    # With second signs or without, on their way to binary or there, in training or not: each is compiled apart, and
    # past torch's 8 forms the others would not be at all.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _FORMS)
    for block in _blocks(lm):
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]


def checkpoint_blocks_(lm: nn.Module) -> None:
    """Keep only the residual stream between blocks for the backward pass; loss and gradients stay the same.

    Activations inside a block are computed again. No block draws random numbers, so no random state is kept. A model
    that is to be compiled too is compiled before.
    """
    for block in _blocks(lm):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]


def _blocks(lm: nn.Module) -> Iterator[Block]:
    return (child for child in lm.modules() if isinstance(child, Block))
