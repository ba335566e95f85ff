"""One decoding step recorded as a CUDA graph, so that a token costs one launch and no memory beyond the state's.

A step of a large model is hundreds of kernels of a few microseconds each; started one by one from Python they take
longer to start than to run.
"""

from functools import cache

import torch
from torch import Tensor

from bimamba_lit.models.lm import MambaLM
from bimamba_lit.models.state import MambaState

_WARM_UP = 2  # kernels are compiled and libraries set up before a recording, not in it


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream a device: cuBLAS keeps tens of megabytes for every stream that it ever ran on."""
    return torch.cuda.Stream(device)


class StepGraph:
    """``lm.step`` for one batch size, replayed on tensors of its own.

    The recording reads the model's weights where they lie: it is stale once they move or a layer is replaced.

    Args:
        lm: The model, on a GPU, in evaluation mode.
        batch_size: B.

    Attributes:
        state: The memory that every step reads and overwrites; zero, as of a model that has read nothing.
    """

    def __init__(self, lm: MambaLM, batch_size: int) -> None:
        self.state = lm.init_state(batch_size)
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=lm.device)
        self._graph = torch.cuda.CUDAGraph()
        stream = _recording_stream(lm.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(lm)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._step(lm)
        for memory in self.state.layers:
            for tensor in memory:
                tensor.zero_()

    def _step(self, lm: MambaLM) -> Tensor:
        logits, state = lm.step(self._tokens, self.state)
        self.read(state)
        return logits

    def read(self, state: MambaState) -> None:
        """Take over the values of another state of the same batch size."""
        for memory, given in zip(self.state.layers, state.layers, strict=True):
            for tensor, value in zip(memory, given, strict=True):
                if tensor.data_ptr() != value.data_ptr():
                    tensor.copy_(value)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a sequence, (B,); return the logits (B, V), which the next step overwrites."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits
