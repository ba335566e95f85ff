"""Shapes of the paper's models (Bi-Mamba, arXiv 2411.11843, table 1) and the work of their parts.

Legend: B batch, L length, D model width, H heads, P head width, N state size, O/I out/in features.
"""

from dataclasses import dataclass

import torch

from bimamba_lit import MambaConfig
from bimamba_lit.bench.gpu.case import Inputs, Work

DEVICE = "cuda"
BATCH, LENGTH, HEAD, STATE, CHUNK, TAPS, VOCABULARY = 8, 2048, 64, 128, 256, 4, 50288
TOKENS = BATCH * LENGTH


@dataclass(frozen=True)
class Model:
    """A Mamba-2 model of the paper.

    Attributes:
        name: By its number of parameters.
        d_model: Model width.
        n_layer: Blocks.
    """

    name: str
    d_model: int
    n_layer: int

    @property
    def heads(self) -> int:
        """Heads of the scan."""
        return 2 * self.d_model // HEAD

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return 2 * self.d_model + 2 * STATE

    @property
    def projections(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """``in_proj`` and ``out_proj`` as (I, O)."""
        return (self.d_model, 4 * self.d_model + 2 * STATE + self.heads), (2 * self.d_model, self.d_model)

    def config(self, layers: int | None = None) -> MambaConfig:
        """Return the model's configuration, or that of its first layers."""
        return MambaConfig(d_model=self.d_model, n_layer=layers or self.n_layer, vocab_size=VOCABULARY)

    def scan(self) -> tuple[Work, Work]:
        """Return the work of SSD forward and backward, in bfloat16 and causal pairs only."""
        tokens = TOKENS
        narrow = 2 * tokens * STATE * 2 + tokens * self.heads * 2
        wide = tokens * self.heads * HEAD * 2
        pair, state = CHUNK * HEAD, HEAD * STATE
        forward = tokens * (self.heads * (pair + 4 * state) + CHUNK * STATE)
        backward = tokens * (self.heads * (2 * pair + 10 * state) + 3 * CHUNK * STATE)
        return Work(2 * wide + narrow, forward), Work(3 * wide + 2 * narrow, backward)


MODELS = (Model("780M", 1536, 48), Model("1.3B", 2048, 48), Model("2.7B", 2560, 64))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
    """Return normal numbers on the GPU."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def widened(inputs: Inputs) -> Inputs:
    """Return the inputs in float32: the numbers by which errors are measured."""
    return {
        name: value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
