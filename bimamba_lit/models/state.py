"""What a model remembers of the tokens it has read: a fixed number of bytes, however many there were."""

from typing import NamedTuple

from torch import Tensor


class LayerState(NamedTuple):
    """Memory of one mixer.

    Attributes:
        conv: The last ``d_conv - 1`` inputs of the convolution, (B, channels, d_conv - 1).
        ssm: The state of the scan in fp32, (B, H, P, N) in Mamba-2 and (B, channels, N) in Mamba-1.
    """

    conv: Tensor
    ssm: Tensor


class MambaState(NamedTuple):
    """Memory of a whole model, made by ``MambaLM.init_state``.

    Attributes:
        layers: One :class:`LayerState` a block.
    """

    layers: tuple[LayerState, ...]
