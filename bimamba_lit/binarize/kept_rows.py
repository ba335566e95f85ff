"""Binary layers some of whose rows stay in full precision.

A row of a projection makes one output. Those of ``in_proj`` that make the step sizes, or the scan's B and C, are a few
percent of it, and the recurrence is built of what they make. A scheme sees the other rows only, as a layer of its own,
so that every scheme can be had with every choice of rows, packed and not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit.binarize.latent import LatentLinear
from bimamba_lit.binarize.linear import DEPLOYED_BITS
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.targets import matching
from bimamba_lit.binarize.wrapper import Wrapper, linear_of
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.kernels.linear import linear

Span = tuple[int, int]


class KeptRows(Wrapper):
    """A layer that is binary but for some of its rows.

    Args:
        whole: The layer whose weights ``(O, I)`` and bias ``(O,)`` are taken over.
        scheme: Makes the binary layer of an ``nn.Linear`` of the other rows, without the bias.
        rows: How many rows make what, by name, in their order; O in all.
        keep: The names of those that stay in full precision.

    Raises:
        UserError: If ``keep`` holds a name that ``rows`` lacks, or all of them.

    Attributes:
        binary: The layer of the others; packed, after :func:`bimamba_lit.binarize.pack_`.
        kept: ``(K, I)`` fp32 parameter, the rows in full precision.
        spans: Where they are in the whole: begins and ends, rising.
        weight: ``(O, I)``, what the layer multiplies by, all rows in their order.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        whole: nn.Linear,
        scheme: Callable[[nn.Linear], LatentLinear | PTBLinear | Wrapper],
        rows: Mapping[str, int],
        keep: Sequence[str],
    ) -> None:
        super().__init__(whole)
        self.names = [name for name in rows if name in keep]
        if unknown := [name for name in keep if name not in rows]:
            hint = f"{nearest(str(unknown[0]), rows)}; rows are {', '.join(rows)}"
            raise UserError(f"keep_rows: there are no rows {unknown[0]!r}{hint}")
        if len(self.names) == len(rows):
            raise UserError("keep_rows: all of its rows are kept: leave the layer out of the targets instead")
        self.spans = _spans(rows, self.names)
        edges = [0, *(edge for span in self.spans for edge in span), self.out_features]
        weight = whole.weight.detach().to(torch.float32)
        self.kept = nn.Parameter(torch.cat([weight[begin:end] for begin, end in self.spans]))
        others = torch.cat([weight[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)])
        self.binary = scheme(linear_of(others))
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach().to(torch.float32))

    @property
    def beside(self) -> str:
        """What it has that a layer of its scheme has not."""
        return f"rows in full precision ({', '.join(self.names)})"

    def _whole(self, binary: Tensor) -> Tensor:
        return in_order(binary, self.kept.to(binary.dtype), self.spans, 0)

    def _outputs(self, x: Tensor) -> Tensor:
        y = in_order(self.binary(x), linear(x, self.kept), self.spans, -1)
        return y if self.bias is None else y + self.bias

    def storage(self) -> dict[str, int]:
        """Return the bits this layer needs once deployed, by part: those of the binary rows, the others in 16 bits."""
        bits = {**self.binary.storage(), "kept_rows": DEPLOYED_BITS * self.kept.numel()}
        return bits if self.bias is None else bits | {"bias": DEPLOYED_BITS * self.bias.numel()}

    def kind(self) -> dict[str, Any]:
        """Return what describes a layer of this kind in a file: that of its binary rows, and ``kept_rows``."""
        return self.binary.kind() | {"kept_rows": self.names}

    def extra_repr(self) -> str:
        """Name the sizes and the rows in full precision when the layer is printed."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, keep={self.names}"


def in_order(binary: Tensor, kept: Tensor, spans: list[Span], dim: int) -> Tensor:
    """Put rows, or outputs, together: the kept ones where ``spans`` says, the binary ones in what is left."""
    pieces: list[Tensor] = []
    done, taken = 0, 0
    for begin, end in spans:
        pieces.append(binary.narrow(dim, done, begin - taken - done))
        pieces.append(kept.narrow(dim, taken, end - begin))
        done, taken = begin - taken, taken + end - begin
    pieces.append(binary.narrow(dim, done, binary.shape[dim] - done))
    return torch.cat(pieces, dim)


def rows_to_keep(
    model: nn.Module, layers: Sequence[str], keep_rows: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Mapping[str, int], list[str]]]:
    """Return the rows of the layers that keep some, by the layer's dotted name, and the names of those that stay.

    Args:
        model: The model. A block tells what the rows of its projections make in ``projection_rows``.
        layers: The dotted names of the layers that are to be made binary.
        keep_rows: Names of rows by fnmatch patterns of layers; see :func:`bimamba_lit.binarize.binarize_`.

    Raises:
        UserError: If a pattern matches none of the layers, or a layer's block does not tell what its rows are.
    """
    kept: dict[str, tuple[Mapping[str, int], list[str]]] = {}
    for pattern, names in keep_rows.items():
        for layer in matching(layers, pattern, "keep_rows"):
            parent, _, last = layer.rpartition(".")
            block = model.get_submodule(parent)
            named = getattr(block, "projection_rows", {})
            rows = named.get(last)
            if rows is None:
                told = f"has some for {', '.join(named)}" if named else "gives its rows none"
                raise UserError(f"keep_rows: rows of {layer} have no names: a {type(block).__name__} {told}")
            wanted = [names] if isinstance(names, str) else names
            if wanted:
                kept[layer] = rows, [*kept.get(layer, (rows, []))[1], *wanted]
    return kept


def _spans(rows: Mapping[str, int], names: Sequence[str]) -> list[Span]:
    spans: list[Span] = []
    end = 0
    for name, size in rows.items():
        begin, end = end, end + size
        if name in names and spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        elif name in names:
            spans.append((begin, end))
    return spans
