"""The matrices of a deployed model: stored small, unpacked on the deployer's machine as the mode asks.

``exact`` holds a dense float32 weight. ``fast`` holds the signs as 8-bit integers, exactly, and rounds activations to 8
bits a token: ``aten::_int_mm`` reads a quarter of the bytes and is ahead of the 4-bit product, of fbgemm's packed form
(whose tensor types PyTorch is taking out) and of bfloat16 wherever a model has them (CPU with AVX-512, 1 to 128
tokens). ``small`` unpacks a block of rows at a time into scratch that stays in cache.

Everything a mode needs is a plain tensor that its `prepare` makes of what is stored, so any mode can follow any other.
Legend: O out features, I in features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit.binarize import BinaryLinear, DoubledInputs, KeptRows, PackedLinear, PTBLinear
from bimamba_lit.binarize.kept_rows import in_order
from bimamba_lit.binarize.linear import TERMS
from bimamba_lit.errors import UserError
from bimamba_lit.kernels.binary_linear.naive import add_terms
from bimamba_lit.kernels.binary_linear.second_signs import chosen_inputs, whole_shift, with_doubled
from bimamba_lit.kernels.binary_weight.naive import compose
from bimamba_lit.kernels.signs.chunked import byte_table, look_up_signs, unpack_signs


class DeployedLinear(nn.Module):
    """A full-precision matrix, stored in half precision and multiplied in float32 in every mode.

    Args:
        weight: (O, I).
        dtype: What to store it in.
        bias: (O,).
    """

    stored: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("stored", rounded(weight, dtype))
        self.register_buffer("bias", rounded(bias, dtype))
        self.weight = torch.empty(0)

    def prepare(self, mode: str) -> None:
        """Hold the weight in float32, unless memory is to stay small."""
        self.weight = torch.empty(0) if mode == "small" else self.stored.float()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., I): (..., O)."""
        y = multiply(x, self.weight if self.weight.numel() > 0 else self.stored.float())
        return y + self.bias.float() if self.bias.numel() > 0 else y


class DeployedBinary(nn.Module):
    """A binary matrix, stored as packed signs and the terms of its scheme's formula; see ``BinaryLinear``.

    Args:
        layer: The layer: trained, packed, or fitted after training with one sign a weight.
        dtype: What to store the terms in.
    """

    signs: Tensor
    in_scale: Tensor
    out_scale: Tensor
    group_scale: Tensor
    in_shift: Tensor
    out_shift: Tensor
    bias: Tensor

    def __init__(self, layer: BinaryLinear | PackedLinear | PTBLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = layer.in_features
        signs = layer.signs if isinstance(layer, PackedLinear) else layer.packed_signs()
        self.register_buffer("signs", signs.detach().clone())
        terms = layer.terms() or {}
        for name in TERMS:
            self.register_buffer(name, rounded(terms.get(name), dtype))
        self.register_buffer("bias", rounded(layer.bias, dtype))
        self.weight = self.integer_scale = self.table = torch.empty(0)  # one tensor takes less of a file than three
        self.integers = torch.empty(0, dtype=torch.int8)

    def prepare(self, mode: str) -> None:
        """Unpack as the mode asks."""
        self.weight = torch.empty(0)
        self.integers = torch.empty(0, dtype=torch.int8)
        self.table = torch.empty(0)
        if mode == "exact":
            self.weight = self._dense()
        elif mode == "small" and torch.jit.is_scripting():  # type: ignore[attr-defined]
            self.table = byte_table(torch.float32, self.signs.device)  # a graph would hold it in the file
        elif mode == "fast":
            signs = unpack_signs(self.signs, self.in_features)
            if self.group_scale.numel() > 0:
                self.integers, self.integer_scale = to_integers(
                    compose(signs, group_scale=self.group_scale.float()), integer_range()
                )
            else:
                self.integers, self.integer_scale = signs.to(torch.int8), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., I): (..., O)."""
        if self.weight.numel() > 0:
            y = multiply(x, self.weight)
            return y + self.bias.float() if self.bias.numel() > 0 else y
        scaled = x * self.in_scale.float() if self.in_scale.numel() > 0 else x
        if self.integers.numel() > 0:
            y = multiply_integers(scaled, self.integers)
            if self.integer_scale.numel() > 0:
                y = y * self.integer_scale
        else:
            y = self._multiply_packed(scaled)
        terms = self._terms()
        return add_terms(
            y,
            x,
            terms.get("out_scale"),
            terms.get("in_shift"),
            terms.get("out_shift"),
            self.bias if self.bias.numel() > 0 else None,
        )

    def _dense(self) -> Tensor:
        terms = self._terms()
        return compose(
            unpack_signs(self.signs, self.in_features),
            terms.get("in_scale"),
            terms.get("out_scale"),
            terms.get("group_scale"),
            terms.get("in_shift"),
            terms.get("out_shift"),
        )

    def _multiply_packed(self, x: Tensor) -> Tensor:
        rows = self.signs.shape[0]
        table = self.table if self.table.numel() > 0 else byte_table(torch.float32, self.signs.device)
        y = torch.empty(x.shape[:-1] + (rows,))
        block = rows_unpacked(rows, self.in_features)
        for start in range(0, rows, block):
            some = slice(start, start + block)
            weight = look_up_signs(self.signs[some], self.in_features, table)
            if self.group_scale.numel() > 0:
                weight = compose(weight, group_scale=self.group_scale[some].float())
            y[..., some] = F.linear(x, weight)
        return y

    def _terms(self) -> dict[str, Tensor]:
        """Return the terms that there are, in float32."""
        terms: dict[str, Tensor] = {}
        if self.in_scale.numel() > 0:
            terms["in_scale"] = self.in_scale.float()
        if self.out_scale.numel() > 0:
            terms["out_scale"] = self.out_scale.float()
        if self.group_scale.numel() > 0:
            terms["group_scale"] = self.group_scale.float()
        if self.in_shift.numel() > 0:
            terms["in_shift"] = whole_shift(self.in_shift.float(), self.in_features)
        if self.out_shift.numel() > 0:
            terms["out_shift"] = self.out_shift.float()
        return terms


class DeployedKeptRows(nn.Module):
    """A binary matrix some of whose rows are in half precision.

    Args:
        layer: The layer.
        binary: The deployed form of its binary rows.
        dtype: What to store the other rows in.
    """

    bias: Tensor

    def __init__(self, layer: KeptRows, binary: "Deployed", dtype: torch.dtype) -> None:
        super().__init__()
        self.spans = layer.spans
        self.binary = binary
        self.kept = DeployedLinear(layer.kept, dtype)
        self.register_buffer("bias", rounded(layer.bias, dtype))

    def prepare(self, mode: str) -> None:
        """Unpack as the mode asks."""
        self.binary.prepare(mode)
        self.kept.prepare(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., I): (..., O)."""
        y = in_order(self.binary(x), self.kept(x), self.spans, -1)
        return y + self.bias.float() if self.bias.numel() > 0 else y


class DeployedDoubledInputs(nn.Module):
    """A binary matrix with a second sign for some of its inputs.

    Args:
        layer: The layer.
        binary: The deployed form of its signs, which reads those inputs twice.
    """

    bitmap: Tensor

    def __init__(self, layer: DoubledInputs, binary: "Deployed") -> None:
        super().__init__()
        self.binary = binary
        self.in_features, self.k = layer.in_features, len(layer.doubled)
        self.register_buffer("bitmap", layer.bitmap.clone())
        self.doubled = torch.empty(0, dtype=torch.int64)

    def prepare(self, mode: str) -> None:
        """Unpack as the mode asks."""
        self.binary.prepare(mode)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            self.doubled = self._chosen()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., I): (..., O)."""
        return self.binary(with_doubled(x, self.doubled if self.doubled.numel() > 0 else self._chosen()))

    def _chosen(self) -> Tensor:
        """Return the inputs with two signs; a graph finds them in every call, or its file would hold them in int64."""
        return chosen_inputs(self.bitmap, self.in_features, self.k)


Deployed = DeployedBinary | DeployedDoubledInputs | DeployedKeptRows | DeployedLinear


class DeployedTable(nn.Module):
    """An embedding table, an output head, or both where the two are tied.

    Args:
        table: (V, D).
        is_head: Whether hidden states are multiplied by it, and not only ids looked up in it.
        dtype: What to store it, or the scale of each row, in.
        int8: Store rows as 8-bit integers with a scale each.
    """

    stored: Tensor
    scale: Tensor

    def __init__(self, table: Tensor, is_head: bool, dtype: torch.dtype, int8: bool) -> None:
        super().__init__()
        self.is_head = is_head
        self.register_buffer("scale", torch.empty(0))
        if int8:
            stored, self.scale = to_integers(table.detach().float(), 127, dtype)
        else:
            stored = rounded(table, dtype)
        self.register_buffer("stored", stored)
        self.weight = torch.empty(0)
        self.integers = torch.empty(0, dtype=torch.int8)
        self.integer_scale = torch.empty(0)

    def prepare(self, mode: str) -> None:
        """Unpack as the mode asks."""
        self.weight = torch.empty(0)
        self.integers = torch.empty(0, dtype=torch.int8)
        if mode == "exact":
            self.weight = self._rows(self.stored, self.scale)
        elif mode == "fast" and self.is_head:
            if self.scale.numel() > 0 and integer_range() == 127:
                self.integers, self.integer_scale = self.stored, self.scale.float()
            else:
                self.integers, self.integer_scale = to_integers(self._rows(self.stored, self.scale), integer_range())

    def embed(self, ids: Tensor) -> Tensor:
        """Return the float32 rows of ids (...): (..., D)."""
        if self.weight.numel() > 0:
            return F.embedding(ids, self.weight)
        flat = ids.reshape(-1)
        scale = self.scale.index_select(0, flat) if self.scale.numel() > 0 else self.scale
        return self._rows(self.stored.index_select(0, flat), scale).view(ids.shape + (-1,))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        if self.weight.numel() > 0:
            return multiply(x, self.weight)
        if self.integers.numel() > 0:
            return multiply_integers(x, self.integers) * self.integer_scale
        rows = self.stored.shape[0]
        y = torch.empty(x.shape[:-1] + (rows,))
        block = rows_unpacked(rows, self.stored.shape[1])
        for start in range(0, rows, block):
            some = slice(start, start + block)
            y[..., some] = F.linear(x, self.stored[some].float())
        return y.mul_(self.scale.float()) if self.scale.numel() > 0 else y

    def _rows(self, stored: Tensor, scale: Tensor) -> Tensor:
        rows = stored.float()
        return rows * scale.float().unsqueeze(1) if scale.numel() > 0 else rows


def rows_unpacked(rows: int, width: int) -> int:
    """Return how many rows to unpack at a time: what stays in cache; in a graph, which writes loops out, all."""
    return 65536 // width + 1 if torch.jit.is_scripting() else rows  # type: ignore[attr-defined]


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (..., I) by a float32 weight (O, I)."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.linear(x, weight)
    width = weight.shape[1]
    if x.numel() > 4 * width or weight.numel() < (1 << 19 if width >= 512 else 1 << 20):
        return F.linear(x, weight)
    # A few tokens: a batch of small products reads memory in order, on all cores; see `kernels.linear`.
    y = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(weight.shape[0], -1, -1), weight.unsqueeze(1).mT)
    return y.squeeze(2).t().contiguous().view(x.shape[:-1] + (weight.shape[0],))


def multiply_integers(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (..., I), rounded to 8 bits a token, by 8-bit integers (O, I)."""
    rows = x.reshape(-1, x.shape[-1])
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    y = torch._int_mm((rows / scale).round().to(torch.int8), weight.t()).float() * scale
    return y.view(x.shape[:-1] + (weight.shape[0],))


def to_integers(weight: Tensor, highest: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Round weight (O, I) to integers of at most ``highest``, with a scale a row (O,) of ``dtype``."""
    scale = (weight.abs().amax(1) / highest).to(dtype).clamp(min=1e-7)  # a row of zeros has a scale too
    integers = (weight / scale.to(weight.dtype).unsqueeze(1)).round().clamp(-highest, highest)
    return integers.to(torch.int8), scale


def integer_range() -> int:
    """Return the largest 8-bit weight whose products are exact here.

    Processors without VNNI add pairs of products in 16 bits, which overflow from 127 x 255 on.
    """
    ones = torch.full((32, 64), 127, dtype=torch.int8)
    return 127 if int(torch._int_mm(ones, ones.t())[0, 0]) == 64 * 127 * 127 else 63


def rounded(value: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a copy in ``dtype``, empty for None.

    Raises:
        UserError: If a value is not finite in ``dtype``.
    """
    if value is None:
        return torch.empty(0, dtype=dtype)
    result = value.detach().to(dtype, copy=True)
    if not torch.isfinite(result).all():
        name = str(dtype).removeprefix("torch.")
        hint = "; use --dtype bfloat16" if dtype == torch.float16 and torch.isfinite(value).all() else ""
        raise UserError(f"the model has weights that are not finite in {name}{hint}")
    return result
