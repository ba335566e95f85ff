"""The Mamba-2 mixer (arXiv 2405.21060, section 7.1), with mamba_ssm's parameter names."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.linear import Linear
from bimamba_lit.models.norm import GatedRMSNorm, at_least_fp32
from bimamba_lit.models.state import LayerState

_A_RANGE = (1.0, 16.0)
_DT_RANGE = (1e-3, 1e-1)
_DT_FLOOR = 1e-4


class Mamba2(nn.Module):
    """``in_proj``, causal convolution, state-space scan (SSD), gated norm, ``out_proj``.

    Shapes: B batch, L length, D model width, H heads, P head width, N state size, G groups. Both projections are called
    as modules, so any module of the same shape can take their place. The initial values are mamba_ssm's: A uniform in
    [1, 16] stored as ``A_log``, dt log-uniform in [1e-3, 1e-1] stored in ``dt_bias`` as the inverse of softplus, D
    one, ``out_proj`` Kaiming-uniform divided by the square root of the number of blocks, the rest as PyTorch has it.

    Args:
        config: The model's sizes.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        assert config.d_state is not None
        self.d_state, self.headdim = config.d_state, config.headdim
        self.nheads, self.ngroups = config.nheads, config.ngroups
        self.d_inner, self.chunk_size = config.d_inner, config.chunk_size
        self.d_bc = self.ngroups * self.d_state
        self.d_xbc = self.d_inner + 2 * self.d_bc

        self.in_proj = Linear(config.d_model, self.d_inner + self.d_xbc + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, config.d_conv, groups=self.d_xbc, padding=config.d_conv - 1)

        low, high = (math.log(dt) for dt in _DT_RANGE)
        dt = torch.exp(torch.rand(self.nheads) * (high - low) + low).clamp(min=_DT_FLOOR)
        self.dt_bias = _without_weight_decay(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = _without_weight_decay(torch.empty(self.nheads).uniform_(*_A_RANGE).log())
        self.D = _without_weight_decay(torch.ones(self.nheads))

        self.norm = GatedRMSNorm(self.d_inner, self.ngroups, config.norm_eps)
        self.out_proj = Linear(self.d_inner, config.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            x: Input (B, L, D).
            attention_mask: (B, L), 1 where a position counts; where it is 0, nothing is read or written.
            seq_idx: (B, L) int32, the number of the document a position belongs to; convolution and scan start afresh
                where it changes.

        Returns:
            The output (B, L, D).
        """
        if attention_mask is not None:
            x = x * attention_mask.to(x.dtype).unsqueeze(-1)
        y = ops.conv_ssd_norm(
            self.in_proj(x),
            *self._filter(),
            self._a(),
            self.D,
            at_least_fp32(self.dt_bias),
            self.norm.weight,
            self.ngroups,
            self.norm.eps,
            self.chunk_size,
            seq_idx,
            attention_mask,
        )
        return self.out_proj(y)

    @property
    def projection_rows(self) -> dict[str, dict[str, int]]:
        """How many rows of a projection make what, in their order."""
        return {"in_proj": {"z": self.d_inner, "x": self.d_inner, "B": self.d_bc, "C": self.d_bc, "dt": self.nheads}}

    def init_state(self, batch_size: int) -> LayerState:
        """Return the memory of a mixer that has read nothing: zeros, the scan's part in fp32."""
        weight = self.conv1d.weight
        return LayerState(
            conv=weight.new_zeros(batch_size, self.d_xbc, weight.shape[-1] - 1),
            ssm=at_least_fp32(self.A_log).new_zeros(batch_size, self.nheads, self.headdim, self.d_state),
        )

    def prefill(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Mix ``x`` (B, L, D) as the continuation of what ``state`` has read; return the output and the new state."""
        z, xbc, dt = self._project(x)
        xbc, conv = ops.causal_conv1d(
            xbc.transpose(1, 2),
            *self._filter(),
            "silu",
            initial_states=state.conv.to(xbc.dtype),
            return_final_states=True,
        )
        x, b, c = self._heads(xbc.transpose(1, 2))
        y, ssm = ops.ssd(
            x,
            at_least_fp32(dt),
            self._a(),
            b,
            c,
            self.chunk_size,
            initial_states=state.ssm,
            return_final_states=True,
            **self._skip_and_bias(),
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), LayerState(conv, ssm)

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Mix one token a sequence, ``x`` (B, D); return the output (B, D) and the new state."""
        z, xbc, dt = self._project(x)
        xbc, conv = ops.causal_conv1d_step(xbc, state.conv.to(xbc.dtype), *self._filter(), "silu")
        x, b, c = self._heads(xbc)
        y, ssm = ops.ssd_step(state.ssm, x, at_least_fp32(dt), self._a(), b, c, **self._skip_and_bias())
        return self.out_proj(self.norm(y.flatten(-2), z)), LayerState(conv, ssm)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([self.d_inner, self.d_xbc, self.nheads], dim=-1)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, b, c = xbc.split([self.d_inner, self.d_bc, self.d_bc], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _filter(self) -> tuple[Tensor, Tensor]:
        return self.conv1d.weight.squeeze(1), cast(Tensor, self.conv1d.bias)

    def _skip_and_bias(self) -> dict[str, Any]:
        return {"D": self.D, "dt_bias": at_least_fp32(self.dt_bias), "dt_softplus": True}

    def _a(self) -> Tensor:
        # exp in half precision would round the slowest decays to one another.
        return -torch.exp(at_least_fp32(self.A_log))


def _without_weight_decay(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
