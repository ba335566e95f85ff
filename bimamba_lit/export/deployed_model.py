# mypy: disable-error-code="empty-body"
"""A trained model as it is deployed: one module of plain tensor operations that scripts, exports and runs anywhere.

Weights are stored small and unpacked by `prepare`; see :mod:`deployed_linear`. A state is a list of two tensors a
block: the convolution's last inputs (B, W-1, E) and the scan's memory, (B, H, P, N) in Mamba-2 and (B, E, N) in
Mamba-1, all float32. What reads tokens overwrites the state it is given.

Legend: B batch, L length, D model width, E channels of the convolution, H heads, P head width, N state size, W taps,
V vocabulary.
"""

import json
import warnings
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit.binarize import (
    BinaryLinear,
    DoubledInputs,
    KeptRows,
    LatentLinear,
    PackedLinear,
    PTBLinear,
    check_format,
    describe_binarization,
)
from bimamba_lit.export.deployed_linear import (
    Deployed,
    DeployedBinary,
    DeployedDoubledInputs,
    DeployedKeptRows,
    DeployedLinear,
    DeployedTable,
    rounded,
)
from bimamba_lit.export.deployed_ops import (
    causal_conv,
    causal_conv_step,
    rms_norm,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from bimamba_lit.models import MambaLM
from bimamba_lit.models.lm import Block
from bimamba_lit.models.mamba1 import Mamba1
from bimamba_lit.models.mamba2 import Mamba2
from bimamba_lit.models.quantized_table import QuantizedEmbedding


class DeployedMamba2(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7.1)."""

    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor

    def __init__(self, mixer: Mamba2, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = [mixer.d_inner, mixer.d_xbc, mixer.nheads]
        self.nheads, self.headdim, self.ngroups, self.d_state = (
            mixer.nheads,
            mixer.headdim,
            mixer.ngroups,
            mixer.d_state,
        )
        self.eps = mixer.norm.eps
        self.in_proj = deployed(mixer.in_proj, dtype)
        self.out_proj = deployed(mixer.out_proj, dtype)
        self.conv = DeployedConv(mixer.conv1d, dtype)
        for name in ("dt_bias", "A_log", "D"):
            self.register_buffer(name, rounded(getattr(mixer, name), dtype))
        self.register_buffer("norm", rounded(mixer.norm.weight, dtype))
        self.A = torch.empty(0)

    def prepare(self, mode: str) -> None:
        """Widen what is small; unpack the projections as the mode asks."""
        self.dt_bias, self.D, self.norm = self.dt_bias.float(), self.D.float(), self.norm.float()
        self.A = -self.A_log.float().exp()
        self.conv.prepare()
        self.in_proj.prepare(mode)
        self.out_proj.prepare(mode)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the memory of a mixer that has read nothing."""
        return self.conv.init_state(batch), torch.zeros(batch, self.nheads, self.headdim, self.d_state)

    def forward(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Mix x (B, L, D)."""
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        x, b, c = self._heads(self.conv(xbc, past))
        y = ssd(x, F.softplus(dt + self.dt_bias), self.A, b, c, state)
        return self._out(y, x, z)

    def step(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Mix one token a sequence, x (B, D)."""
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        x, b, c = self._heads(self.conv.step(xbc, past))
        y = ssd_step(x, F.softplus(dt + self.dt_bias), self.A, b, c, state)
        return self._out(y, x, z)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.ngroups * self.d_state
        x, b, c = xbc.split([self.sizes[0], maps, maps], -1)
        groups = [self.ngroups, self.d_state]
        return x.unflatten(-1, [self.nheads, self.headdim]), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _out(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = torch.addcmul(y, x, self.D.unsqueeze(1)).flatten(-2)
        return self.out_proj(rms_norm(y * F.silu(z), self.norm, self.eps, self.ngroups))


class DeployedMamba1(nn.Module):
    """The Mamba-1 mixer (arXiv 2312.00752, section 3.4)."""

    A_log: Tensor
    D: Tensor

    def __init__(self, mixer: Mamba1, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_inner, self.d_state = mixer.d_inner, mixer.d_state
        self.sizes = [mixer.dt_rank, mixer.d_state, mixer.d_state]
        self.in_proj = deployed(mixer.in_proj, dtype)
        self.x_proj = deployed(mixer.x_proj, dtype)
        self.dt_proj = deployed(mixer.dt_proj, dtype)
        self.out_proj = deployed(mixer.out_proj, dtype)
        self.conv = DeployedConv(mixer.conv1d, dtype)
        for name in ("A_log", "D"):
            self.register_buffer(name, rounded(getattr(mixer, name), dtype))
        self.A = torch.empty(0)

    def prepare(self, mode: str) -> None:
        """Widen what is small; unpack the projections as the mode asks."""
        self.D, self.A = self.D.float(), -self.A_log.float().exp()
        self.conv.prepare()
        self.in_proj.prepare(mode)
        self.x_proj.prepare(mode)
        self.dt_proj.prepare(mode)
        self.out_proj.prepare(mode)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the memory of a mixer that has read nothing."""
        return self.conv.init_state(batch), torch.zeros(batch, self.d_inner, self.d_state)

    def forward(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Mix x (B, L, D)."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.conv(u, past)
        dt, b, c = self.x_proj(u).split(self.sizes, -1)
        y = selective_scan(u, F.softplus(self.dt_proj(dt)), self.A, b, c, state)
        return self._out(y, u, z)

    def step(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Mix one token a sequence, x (B, D)."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.conv.step(u, past)
        dt, b, c = self.x_proj(u).split(self.sizes, -1)
        y = selective_scan_step(u, F.softplus(self.dt_proj(dt)), self.A, b, c, state)
        return self._out(y, u, z)

    def _out(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(torch.addcmul(y, u, self.D) * F.silu(z))


class DeployedConv(nn.Module):
    """The causal convolution and SiLU before the scan."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        weight = conv.weight.detach().squeeze(1).t().contiguous()
        self.register_buffer("weight", rounded(weight, dtype))  # (W, E)
        self.register_buffer(
            "bias", rounded(weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias, dtype)
        )

    def prepare(self) -> None:
        """Widen the weights."""
        self.weight, self.bias = self.weight.float(), self.bias.float()

    def init_state(self, batch: int) -> Tensor:
        """Return the past of what has read nothing."""
        return torch.zeros(batch, self.weight.shape[0] - 1, self.weight.shape[1])

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Convolve x (B, L, E)."""
        return causal_conv(x, past, self.weight, self.bias)

    def step(self, x: Tensor, past: Tensor) -> Tensor:
        """Convolve one token a sequence, x (B, E)."""
        return causal_conv_step(x, past, self.weight, self.bias)


class DeployedBlock(nn.Module):
    """One residual block: ``x + mixer(norm(x))``."""

    norm: Tensor

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = block.norm.eps
        self.register_buffer("norm", rounded(block.norm.weight, dtype))
        mixer = block.mixer
        self.mixer = DeployedMamba2(mixer, dtype) if isinstance(mixer, Mamba2) else DeployedMamba1(mixer, dtype)

    @torch.jit.export
    def prepare(self, mode: str) -> None:
        """Widen the norm; unpack the mixer as the mode asks."""
        self.norm = self.norm.float()
        self.mixer.prepare(mode)

    @torch.jit.export
    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the memory of a block that has read nothing."""
        return self.mixer.init_state(batch)

    def forward(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Continue with x (B, L, D)."""
        return x + self.mixer(rms_norm(x, self.norm, self.eps, 1), past, state)

    @torch.jit.export
    def step(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """Continue with one token a sequence, x (B, D)."""
        return x + self.mixer.step(rms_norm(x, self.norm, self.eps, 1), past, state)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*torch.jit.interface.*deprecated")

    @torch.jit.interface
    class AnyBlock(nn.Module):
        """What the model calls a block through.

        A script writes a loop over modules out, block by block, and optimizes the whole; a call through an interface is
        a call, so that all blocks share one small graph: seconds and hundreds of megabytes less where the model runs.
        """

        def prepare(self, mode: str) -> None:  # noqa: D102
            pass

        def init_state(self, batch: int) -> tuple[Tensor, Tensor]:  # noqa: D102
            pass

        def forward(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:  # noqa: D102
            pass

        def step(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:  # noqa: D102
            pass


class DeployedLM(nn.Module):
    """A model as :func:`torch.jit.script` takes it: `forward`, `init_state`, `prefill`, `step`, `generate`, `prepare`.

    Args:
        lm: The model, latent, packed or in full precision.
        dtype: What everything that is not a sign is stored in.
        int8: Store the embedding and the head as 8-bit integers with a scale a row.

    Attributes:
        config: The model's configuration as JSON.
        scheme: What is binary in it, as JSON: scheme, options and layers.
        vocab_size: V.
        mode: What `prepare` was last called with; empty before.
    """

    norm: Tensor
    tied: Final[bool]

    def __init__(self, lm: MambaLM, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__()
        check_format(lm, "torchscript")
        self.config = json.dumps(lm.config.to_dict())
        self.scheme = json.dumps(describe_binarization(lm))
        self.vocab_size = lm.config.known_vocab_size
        self.mode = ""
        backbone = lm.backbone
        embedding, head = backbone.embedding, lm.lm_head
        quantized = isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedEmbedding)
        self.tied = head.table is embedding.table if quantized else head.weight is embedding.weight
        self.embedding = DeployedTable(embedding.weight[: self.vocab_size], self.tied, dtype, int8)
        self.blocks = nn.ModuleList(DeployedBlock(block, dtype) for block in backbone.layers)  # type: ignore[arg-type]
        if not self.tied:
            dense = isinstance(head, nn.Linear | QuantizedEmbedding) and not isinstance(head, LatentLinear)
            self.head = (
                DeployedTable(head.weight[: self.vocab_size], True, dtype, int8) if dense else deployed(head, dtype)
            )
        self.eps = backbone.norm_f.eps
        self.register_buffer("norm", rounded(backbone.norm_f.weight, dtype))

    @torch.jit.export
    def prepare(self, mode: str = "exact") -> None:
        """Unpack the weights on this machine; any mode can follow any other.

        Args:
            mode: ``exact``, float32 weights; ``fast``, 8-bit activations; ``small``, weights stay packed.
        """
        if mode != "exact" and mode != "fast" and mode != "small":
            raise ValueError("mode must be exact, fast or small, not '" + mode + "'")
        self.norm = self.norm.float()
        self.embedding.prepare(mode)
        if not self.tied:
            self.head.prepare(mode)
        for i in range(len(self.blocks)):
            block: AnyBlock = self.blocks[i]  # type: ignore[assignment]
            block.prepare(mode)
        self.mode = mode

    @torch.jit.export
    def init_state(self, batch: int) -> list[Tensor]:
        """Return the state of a model that has read nothing, for ``batch`` sequences."""
        states: list[Tensor] = []
        for i in range(len(self.blocks)):
            block: AnyBlock = self.blocks[i]  # type: ignore[assignment]
            past, state = block.init_state(batch)
            states.append(past)
            states.append(state)
        return states

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, L, V) of tokens (B, L)."""
        return self._logits(self._read(ids, self.init_state(ids.shape[0])))

    @torch.jit.export
    def prefill(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Continue from a state with tokens (B, L): logits (B, L, V) and the state, overwritten."""
        return self._logits(self._read(ids, state)), state

    @torch.jit.export
    def step(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Continue from a state with one token a sequence (B,): logits (B, V) and the state, overwritten."""
        if ids.dim() != 1:
            raise ValueError("step takes token ids of the shape (batch,)")
        self._check(ids, state)
        x = self.embedding.embed(ids)
        for i in range(len(self.blocks)):
            block: AnyBlock = self.blocks[i]  # type: ignore[assignment]
            x = block.step(x, state[2 * i], state[2 * i + 1])
        return self._logits(rms_norm(x, self.norm, self.eps, 1)), state

    @torch.jit.export
    def generate(self, ids: Tensor, n: int, temperature: float = 1.0) -> Tensor:
        """Continue tokens (B, L) by n drawn from the model: (B, L + n).

        Args:
            ids: The prompts.
            n: How many tokens to add to each.
            temperature: Divides the logits; 0 takes the likeliest token. Draws come from the global generator.
        """
        if n < 0 or temperature < 0:
            raise ValueError("n and temperature must be 0 or more")
        state = self.init_state(ids.shape[0])
        hidden = torch.empty(0)
        for piece in ids.split(512, 1):  # so that a long prompt needs no more memory than a short one
            hidden = self._read(piece, state)
        logits = self._logits(hidden[:, -1])
        out = [ids]
        for i in range(n):
            if i > 0:
                logits, _ = self.step(out[-1].squeeze(1), state)
            if temperature == 0:
                out.append(logits.argmax(-1, keepdim=True))
            else:
                out.append(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
        return torch.cat(out, 1)

    def _read(self, ids: Tensor, state: list[Tensor]) -> Tensor:
        """Return the hidden states (B, L, D) of tokens (B, L), continued from a state that is overwritten."""
        if ids.dim() != 2:
            raise ValueError("token ids must have the shape (batch, length)")
        self._check(ids, state)
        x = self.embedding.embed(ids)
        for i in range(len(self.blocks)):
            block: AnyBlock = self.blocks[i]  # type: ignore[assignment]
            x = block.forward(x, state[2 * i], state[2 * i + 1])
        return rms_norm(x, self.norm, self.eps, 1)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.embedding(hidden) if self.tied else self.head(hidden)[..., : self.vocab_size]

    def _check(self, ids: Tensor, state: list[Tensor]) -> None:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return  # torch.export cannot read values
        if self.mode == "":
            self.prepare("exact")
        if ids.numel() == 0:
            raise ValueError("there are no tokens to read")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ValueError("a token id is outside the vocabulary of " + str(self.vocab_size))
        if len(state) != 2 * len(self.blocks) or state[0].shape[0] != ids.shape[0]:
            raise ValueError("the state is not one of this model's for as many sequences: see init_state")


def deployed(layer: nn.Module, dtype: torch.dtype) -> Deployed:
    """Return the deployed form of a projection."""
    if isinstance(layer, KeptRows):
        return DeployedKeptRows(layer, deployed(layer.binary, dtype), dtype)
    if isinstance(layer, DoubledInputs):
        return DeployedDoubledInputs(layer, deployed(layer.binary, dtype))
    if isinstance(layer, BinaryLinear | PackedLinear) or (isinstance(layer, PTBLinear) and layer.terms() is not None):
        return DeployedBinary(layer, dtype)
    assert isinstance(layer, nn.Linear | PTBLinear)
    return DeployedLinear(layer.weight, dtype, layer.bias)
