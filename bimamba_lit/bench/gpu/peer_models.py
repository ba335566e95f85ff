"""mamba_ssm's blocks as a user would stack them, dense or with binary weights formed on the fly."""

from collections.abc import Iterable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit import MambaLM
from bimamba_lit.bench.gpu.peers import installed, mamba_ssm


class PeerBlocks(nn.Module):
    """mamba_ssm's Mamba-2 mixers with its fused residual addition and norm, on the GPU.

    Args:
        d_model: Width D.
        layers: Number of blocks.
        vocabulary: Size V of a tied embedding and head, for `step`; 0 for none.
    """

    def __init__(self, d_model: int, layers: int, vocabulary: int = 0) -> None:
        super().__init__()
        mixer = mamba_ssm("modules.mamba2").Mamba2
        norms = mamba_ssm("ops.triton.layer_norm")
        self._normed: Any = norms.layer_norm_fn
        fused = {"use_mem_eff_path": installed("causal_conv1d") is not None}
        with torch.device("cuda"):
            self.mixers = nn.ModuleList(mixer(d_model, layer_idx=layer, **fused) for layer in range(layers))
            self.norms = nn.ModuleList(norms.RMSNorm(d_model) for _ in range(layers + bool(vocabulary)))
            self.embedding = nn.Embedding(vocabulary, d_model) if vocabulary else None
        self._states: list[tuple[Tensor, Tensor]] = []

    def take_over(self, blocks: Iterable[Any]) -> Self:
        """Take the weights of this project's Mamba-2 blocks, whose names are the same, and return these blocks."""
        for block, norm, mixer in zip(blocks, self.norms, self.mixers, strict=False):
            norm.load_state_dict(block.norm.state_dict())
            mixer.load_state_dict(block.mixer.state_dict())
        return self

    def take_over_all(self, lm: MambaLM) -> Self:
        """Take the weights of a whole model, and return these blocks."""
        assert self.embedding is not None
        self.embedding.load_state_dict({"weight": lm.backbone.embedding.weight[: self.embedding.num_embeddings]})
        self.norms[-1].load_state_dict(lm.backbone.norm_f.state_dict())
        return self.take_over(lm.backbone.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x`` (B, L, D)."""
        residual: Tensor | None = None
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x, residual = self._add_and_norm(norm, x, residual)
            x = mixer(x)
        assert residual is not None
        return x + residual

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Return the logits (B, V) after one token a sequence, (B,); states are kept here."""
        assert self.embedding is not None
        if not self._states:
            caches = (cast(Any, mixer).allocate_inference_cache(len(token), 1) for mixer in self.mixers)
            self._states = list(caches)
        x, residual = self.embedding(token)[:, None], None
        for norm, mixer, states in zip(self.norms, self.mixers, self._states, strict=False):
            x, residual = self._add_and_norm(norm, x, residual)
            x, *_ = mixer.step(x, *states)  # type: ignore[operator]
        x, _ = self._add_and_norm(self.norms[-1], x, residual)
        return F.linear(x[:, 0], self.embedding.weight)

    def _add_and_norm(self, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._normed(
            x, norm.weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=norm.eps, is_rms_norm=True
        )


class _OnTheFly(nn.Module):
    """FBI-Linear in plain PyTorch, as its release forms it: scale times sign plus shift, at every call."""

    bias = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.latent = nn.Parameter(linear.weight.detach())
        self.shift = nn.Parameter(self.latent.detach().mean(0))
        self.scale = nn.Parameter((self.latent.detach() - self.shift).abs().mean(0))

    @property
    def weight(self) -> Tensor:
        return self.scale * _Sign.apply(self.latent) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        return torch.sign(latent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def on_the_fly_(blocks: PeerBlocks) -> PeerBlocks:
    """Put FBI-Linear in the place of both projections of every mixer, and return the blocks."""
    for mixer in blocks.mixers:
        for name in ("in_proj", "out_proj"):
            setattr(mixer, name, _OnTheFly(getattr(mixer, name)))
    return blocks
