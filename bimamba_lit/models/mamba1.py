"""The Mamba-1 mixer (arXiv 2312.00752, section 3.4), with mamba_ssm's parameter names."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize import no_decay
from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.linear import Linear
from bimamba_lit.models.norm import at_least_fp32
from bimamba_lit.models.state import LayerState

_DT_RANGE = (1e-3, 1e-1)
_DT_FLOOR = 1e-4


class Mamba1(nn.Module):
    """``in_proj``, causal convolution, selective scan with a gate, ``out_proj``.

    Shapes: B batch, L length, D model width, E inner width, N state size, R rank of the step sizes. ``in_proj``,
    ``x_proj`` and ``out_proj`` are called as modules, so any module of the same shape can take their place. The initial
    values are mamba_ssm's: ``A_log`` the logarithm of 1 to N in every channel, ``dt_proj.weight`` uniform within
    R^-0.5, dt log-uniform in [1e-3, 1e-1] stored in ``dt_proj.bias`` as the inverse of softplus, D one, ``out_proj``
    Kaiming-uniform divided by the square root of the number of blocks, the rest as PyTorch has it.

    Args:
        config: The model's sizes.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        assert config.d_state is not None and config.dt_rank is not None
        self.d_inner, self.d_state, self.dt_rank = config.d_inner, config.d_state, config.dt_rank

        self.in_proj = Linear(config.d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner, padding=config.d_conv - 1
        )
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = (math.log(dt) for dt in _DT_RANGE)
        dt = torch.exp(torch.rand(self.d_inner) * (high - low) + low).clamp(min=_DT_FLOOR)
        self.dt_proj.bias = no_decay(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = no_decay(torch.arange(1.0, self.d_state + 1).log().repeat(self.d_inner, 1))
        self.D = no_decay(torch.ones(self.d_inner))
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
        mask = None if attention_mask is None else attention_mask.to(x.dtype).unsqueeze(-1)
        u, z = self.in_proj(x if mask is None else x * mask).chunk(2, dim=-1)
        u = cast(Tensor, ops.causal_conv1d(u.transpose(1, 2), *self._filter(), "silu", seq_idx=seq_idx))
        if mask is not None:
            # The convolution's bias would otherwise enter the state at positions that hold nothing.
            u = u * mask.to(u.dtype).transpose(1, 2)
        delta, b, c = (part.transpose(1, 2) for part in self._select(u.transpose(1, 2)))
        gate = z.transpose(1, 2)
        y = ops.selective_scan(u, delta, self._a(), b, c, z=gate, seq_idx=seq_idx, **self._skip_and_bias())
        return self.out_proj(cast(Tensor, y).transpose(1, 2))

    @property
    def projection_rows(self) -> dict[str, dict[str, int]]:
        """How many rows of a projection make what, in their order."""
        return {
            "in_proj": {"x": self.d_inner, "z": self.d_inner},
            "x_proj": {"dt": self.dt_rank, "B": self.d_state, "C": self.d_state},
        }

    def init_state(self, batch_size: int) -> LayerState:
        """Return the memory of a mixer that has read nothing: zeros, the scan's part in fp32."""
        weight = self.conv1d.weight
        return LayerState(
            conv=weight.new_zeros(batch_size, self.d_inner, weight.shape[-1] - 1),
            ssm=at_least_fp32(self.A_log).new_zeros(batch_size, self.d_inner, self.d_state),
        )

    def prefill(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Mix ``x`` (B, L, D) as the continuation of what ``state`` has read; return the output and the new state."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = ops.causal_conv1d(
            u.transpose(1, 2),
            *self._filter(),
            "silu",
            initial_states=state.conv.to(u.dtype),
            return_final_states=True,
        )
        delta, b, c = (part.transpose(1, 2) for part in self._select(u.transpose(1, 2)))
        y, ssm = ops.selective_scan(
            u,
            delta,
            self._a(),
            b,
            c,
            z=z.transpose(1, 2),
            initial_states=state.ssm,
            return_last_state=True,
            **self._skip_and_bias(),
        )
        return self.out_proj(y.transpose(1, 2)), LayerState(conv, ssm)

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Mix one token a sequence, ``x`` (B, D); return the output (B, D) and the new state."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = ops.causal_conv1d_step(u, state.conv.to(u.dtype), *self._filter(), "silu")
        delta, b, c = self._select(u)
        y, ssm = ops.selective_scan_step(state.ssm, u, delta, self._a(), b, c, z=z, **self._skip_and_bias())
        return self.out_proj(y), LayerState(conv, ssm)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what depends on the input ``u`` (..., E): step sizes before the bias (..., E), B and C (..., N)."""
        dt, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # The bias is left to the scan, which adds it in fp32: rounded to bf16 it would move small steps by a percent.
        return F.linear(dt, self.dt_proj.weight), b, c

    def _filter(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _skip_and_bias(self) -> dict[str, Any]:
        return {"D": self.D, "delta_bias": at_least_fp32(self.dt_proj.bias), "delta_softplus": True}

    def _a(self) -> Tensor:
        # exp in half precision would round the slowest decays to one another.
        return -torch.exp(at_least_fp32(self.A_log))
