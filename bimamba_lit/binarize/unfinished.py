"""Layers on their way from full precision to binary: progressive binarization.

The weight of such a layer lies between its latent weight and its binary weight, and is differentiated as it stands.
How far it has come is part of a saved model's description, so that a model out of an unfinished run computes what it
computed there; its signs alone would be another model, and are not given away.

Legend: O out features, I in features.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.kernels.binary_weight import naive

Way = Literal["rows", "mix", "tanh"]
STEEPEST = 30.0
_LEAST = 1e-5


@dataclass(frozen=True)
class Unfinished:
    """How far a layer has come on its way to binary.

    Args:
        way: ``rows``: the first ``share`` of the rows are binary, the others latent (incremental network quantization,
            arXiv 1702.03044, has it by magnitude). ``mix``: ``(1 - share) latent + share binary``. ``tanh``: in place
            of the sign ``tanh(k v / s)``, v what the sign is taken of, s its row's mean abs(v), and
            k = 30 ** ``share`` (continuation, as HashNet, arXiv 1702.00758, has it); no gradient flows through s.
        share: 0 (not begun) to 1.

    Raises:
        UserError: If there is no such way or ``share`` is not between 0 and 1.
    """

    way: Way
    share: float

    def __post_init__(self) -> None:
        if self.way not in get_args(Way):
            raise UserError(f"a layer becomes binary by {', '.join(get_args(Way))}, not by {self.way!r}")
        if not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise UserError(f"the share that is binary must be a number from 0 to 1, not {self.share!r}")

    def weight(self, latent: Tensor, centred: Tensor, binary: Callable[[], Tensor], terms: dict[str, Tensor]) -> Tensor:
        """Return the weight ``(O, I)`` of a layer that has come this far.

        Args:
            latent: Latent weights ``(O, I)``.
            centred: What the sign is taken of, ``(O, I)``.
            binary: Forms the binary weight ``(O, I)``, where it is part of that.
            terms: The terms of the scheme's formula.
        """
        match self.way:
            case "rows":
                rows = torch.arange(len(latent), device=latent.device) < int(self.share * len(latent))
                return torch.where(rows.unsqueeze(1), binary(), latent)
            case "mix":
                return torch.lerp(latent, binary(), self.share)
            case "tanh":
                return naive.compose(torch.tanh(STEEPEST**self.share * centred / row_scale(centred)), **terms)

    def plain(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        return asdict(self)


def row_scale(centred: Tensor) -> Tensor:
    """Return the mean abs of each row of what the sign is taken of, detached, ``(O, 1)``: 1e-5 at least."""
    centred = centred.detach()
    return (torch.linalg.vector_norm(centred, ord=1, dim=1, keepdim=True) / centred.shape[1]).clamp(min=_LEAST)
