"""Convolution, SSD and gated norm of a Mamba-2 mixer on a GPU, as one operation that autograd and torch.compile know.

The kernels are those of the three ops. As three ops, autograd would put the gradients of their inputs together from
parts, of which the projected features and the convolution's outputs have three each: two passes over both. As one, each
kernel writes its gradient into its part of one tensor.

Legend: as in `naive`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bimamba_lit.kernels.causal_conv1d import triton as causal_conv1d
from bimamba_lit.kernels.causal_conv1d.naive import accumulator, document_numbers
from bimamba_lit.kernels.configurations import CompileCase
from bimamba_lit.kernels.conv_ssd_norm import naive
from bimamba_lit.kernels.conv_ssd_norm.naive import Layout
from bimamba_lit.kernels.rms_norm import triton as rms_norm
from bimamba_lit.kernels.ssd import triton as ssd
from bimamba_lit.kernels.ssd.triton_backward import Destinations

separate = partial(
    naive.conv_ssd_norm, conv=causal_conv1d.causal_conv1d, scan=ssd.ssd, norm=rms_norm.rms_norm
)  # the three ops in Triton, each one by itself


def conv_ssd_norm(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    groups: int = 1,
    eps: float = 1e-5,
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute what `naive.conv_ssd_norm` computes; `chunk_size` plays no part where SSD's kernels take the inputs."""
    parameters = (conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    layout = Layout.of(conv_weight, A, norm_weight, groups)
    if not ssd.fits(projected, layout.inner // layout.heads, layout.state):
        return separate(projected, *parameters, groups, eps, chunk_size, seq_idx, mask)
    documents = None if seq_idx is None else document_numbers(seq_idx).to(torch.int32)
    y: Tensor = _mix(projected, *parameters, documents, mask, groups, eps)[0]
    return y


class Call(NamedTuple):
    """The arguments of a call; `documents` are numbered from 0 (B, L), `mask` is (B, L)."""

    projected: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    documents: Tensor | None
    mask: Tensor | None
    groups: int
    eps: float

    @property
    def layout(self) -> Layout:
        """Return the widths of the parts."""
        return Layout.of(self.conv_weight, self.A, self.norm_weight, self.groups)

    def masked(self, xbc: Tensor) -> Tensor:
        """Set (B, L, K) to zero where the mask is, in place."""
        return xbc if self.mask is None else xbc.mul_(self.mask[..., None].to(xbc.dtype))

    def scan(self, xbc: Tensor) -> ssd.Call:
        """Return the call of SSD with what the convolution gave."""
        x, B, C = self.layout.scanned(xbc)
        _, _, dt = self.layout.parts(self.projected)
        return ssd.Call.of(x, dt, self.A, B, C, self.D, None, self.dt_bias, None, self.documents, True, 0.0, math.inf)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result (B, L, I), and what the backward pass needs.

    That is the convolution's outputs (B, L, K), SSD's (B, L, I) and the norm's factors (B L, G).
    """
    z, inputs, _ = call.layout.parts(call.projected)
    xbc = causal_conv1d.forward(inputs.mT, call.conv_weight, call.conv_bias, None, call.documents, silu=True).mT
    xbc = call.masked(xbc)
    y = ssd.forward(call.scan(xbc))[0].flatten(-2)
    out, scale = rms_norm.forward(y.flatten(0, 1), call.norm_weight, z.flatten(0, 1), call.eps, call.groups, y.dtype)
    return out.view(y.shape), xbc, y, scale


def backward(gout: Tensor, xbc: Tensor, y: Tensor, scale: Tensor, call: Call) -> list[Tensor]:
    """Return the gradients of the projected features and of the parameters, in their order, in their dtypes."""
    layout = call.layout
    z, inputs, _ = layout.parts(call.projected)
    g_projected = call.projected.new_empty(call.projected.shape)
    gz, g_inputs, g_dt = layout.parts(g_projected)
    gy, _, g_norm = rms_norm.backward(
        gout.reshape(-1, layout.inner), y.flatten(0, 1), call.norm_weight, z.flatten(0, 1), scale, gz.flatten(0, 1)
    )
    g_xbc = xbc.new_empty(xbc.shape)
    gx, gB, gC = layout.scanned(g_xbc)
    scanned = ssd.backward(gy.view(gx.shape), None, call.scan(xbc), Destinations(gx, g_dt, gB, gC))
    _, g_weight, g_bias, _ = causal_conv1d.backward(
        call.masked(g_xbc).mT, inputs.mT, call.conv_weight, call.conv_bias, None, call.documents, True, g_inputs.mT
    )
    found = (g_weight, g_bias, scanned["A"], scanned["D"].sum(1), scanned["dt_bias"], g_norm)
    return [g_projected, *(g.to(t.dtype) for g, t in zip(found, call[1:7], strict=True))]


@torch.library.custom_op("bimamba_lit::conv_ssd_norm", mutates_args=())
def _mix(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, documents: Tensor | None, mask: Tensor | None, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return forward(Call(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, documents, mask, groups, eps))


@_mix.register_fake
def _(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, documents, mask, groups, eps):
    batch, length, _ = projected.shape
    inner = norm_weight.shape[0]
    return (
        projected.new_empty(batch, length, inner),
        projected.new_empty(batch, length, conv_weight.shape[0]),
        projected.new_empty(batch, length, inner),
        projected.new_empty(batch * length, groups, dtype=accumulator(projected)),
    )


@torch.library.custom_op("bimamba_lit::conv_ssd_norm_backward", mutates_args=())
def _mix_backward(
    gout: Tensor, xbc: Tensor, y: Tensor, scale: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor, documents: Tensor | None, mask: Tensor | None,
    groups: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    call = Call(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, documents, mask, groups, eps)
    return backward(gout, xbc, y, scale, call)


@_mix_backward.register_fake
def _(gout, xbc, y, scale, projected, conv_weight, *inputs):
    g_weight = conv_weight.new_empty(conv_weight.shape[::-1]).t()
    return [projected.new_empty(projected.shape), g_weight, *(t.new_empty(t.shape) for t in inputs[:5])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gout is None:
        return (None,) * 11
    return *_mix_backward(gout, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None, None, None


_mix.register_autograd(_gradients, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """Return the call by which the kernels are compiled with parts of one tensor, without a GPU."""

    def both() -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        heads, inner, channels = 48, 3072, 3328
        projected = empty(8, 2048, inner + channels + heads, dtype=torch.bfloat16)
        vector = empty(heads)
        weights = (empty(channels, 4), empty(channels), vector, vector, vector, empty(inner))
        call = Call(projected, *weights, None, None, 1, 1e-5)
        out, xbc, y, scale = forward(call)
        backward(out, xbc, y, scale, call)

    return [CompileCase("bf16", both, representative=True)]
