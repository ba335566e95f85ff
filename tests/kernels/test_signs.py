"""Packed bits: their definition bit by bit, and exact round trips."""

import pytest
import torch

from bimamba_lit import ops

WIDTHS = range(1, 34)
BACKENDS = ["naive", "chunked"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_bit_is_where_it_belongs(width, backend):
    w = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    packed = ops.pack_signs(w, backend=backend)
    assert packed.dtype == torch.uint8
    expected = [[sum(2**bit for bit in range(8) if 8 * byte + bit < width and row[8 * byte + bit] > 0)
                 for byte in range((width + 7) // 8)] for row in w.tolist()]  # fmt: skip
    assert packed.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip(width, dtype, backend):
    w = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    unpacked = ops.unpack_signs(ops.pack_signs(w, backend=backend), width, dtype, backend=backend)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, torch.where(w > 0, 1.0, -1.0).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_is_negative_and_views_are_read_as_they_are(backend):
    w = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, float("inf"), -float("inf")]])
    assert ops.pack_signs(w, backend=backend).tolist() == [[0b010100]]
    wide = torch.randn(20, 34)
    view = wide.t()[1::2, 3:]
    signs = ops.pack_signs(view, backend=backend)
    assert torch.equal(signs, ops.pack_signs(view.contiguous()))
    padded = torch.stack([signs, signs], dim=2)[:, :, 0]
    assert torch.equal(ops.unpack_signs(padded, 17, backend=backend), view.sign())
