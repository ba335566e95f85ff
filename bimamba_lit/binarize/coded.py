"""A linear layer whose weight is a code of more than one bit.

What such a layer is stored as is a post-training scheme's: its codes and its numbers, bit for bit. Packed, it is that
scheme's layer. Numbers are rounded to fp16 in training already, so that both compute the same.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import DEPLOYED_BITS
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.ptb.scheme import PTBScheme


class CodedLinear(LatentLinear):
    """A linear layer with latent weights in fp32 and a weight of a few bits computed from them; what others do beside.

    GGUF has no type for the codes. TorchScript, ``torch.export`` and transformers hold the weight dense in 16 bits.

    Attributes:
        stored_as: The post-training scheme whose parts the layer is stored as.
        parts: Those parts, by name.
        empty_parts: The same on the meta device.
    """

    formats = ("torchscript", "pt2", "safetensors", "transformers")

    @property
    @abstractmethod
    def stored_as(self) -> PTBScheme:
        """The post-training scheme whose parts the layer is stored as."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """What the layer is stored as, by name; ``stored_as.decode`` makes exactly its weight of it."""

    @property
    def empty_parts(self) -> dict[str, Tensor]:
        """The parts on the meta device: their sizes without their values, however the layer's own are spread."""
        return self.stored_as.encode(torch.empty(self.out_features, self.in_features, device="meta"), None)

    def terms(self) -> None:
        """Return None: the weight is more than one sign each."""

    def storage(self) -> dict[str, int]:
        """Return the bits that the layer is stored in, by part: those of the parts' own bytes; the bias in 16 bits."""
        bits = {name: 8 * part.nbytes for name, part in self.empty_parts.items()}
        if self.bias is not None:
            bits["bias"] = DEPLOYED_BITS * self.bias.numel()
        return bits

    def packed(self) -> PTBLinear:
        """Return the layer as it is stored, for inference; the same outputs to the bit."""
        return PTBLinear(self, self.stored_as, self.parts)
