"""A Mamba language model: embedding, residual blocks, final norm, output head.

The residual stream is the plain sum of the embedding and every mixer's output, kept in fp32 by default: it is what
lets the mixers run in half precision. Parameter names are mamba_ssm's, so its checkpoints need no renaming. Every
projection, the head included, is called as a module, so a binary layer can take the place of any of them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bimamba_lit.errors import UserError
from bimamba_lit.kernels.autocast import product_dtype
from bimamba_lit.models.config import MambaConfig
from bimamba_lit.models.linear import Linear
from bimamba_lit.models.mamba1 import Mamba1
from bimamba_lit.models.mamba2 import Mamba2
from bimamba_lit.models.norm import RMSNorm, at_least_fp32
from bimamba_lit.models.packed_step import step_blocks
from bimamba_lit.models.state import LayerState, MambaState

_EMBEDDING_STD = 0.02


class LMOutput(NamedTuple):
    """What a language model returns.

    Attributes:
        logits: (B, L, V), V the vocabulary without the padding of the table.
    """

    logits: Tensor


class Block(nn.Module):
    """One residual block: ``x + mixer(norm(x))``."""

    def __init__(self, config: MambaConfig, layer: int) -> None:
        super().__init__()
        config = config.of_layer(layer)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba1(config) if config.mixer == "mamba" else Mamba2(config)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Add the mixer's output to the residual stream ``x`` (B, L, D)."""
        # What the mixer's projection would round to: the norm then writes, and its gradient reads, half the bytes.
        y, x = self.norm(x, product_dtype(x), with_residual=True)
        return x + self.mixer(y, attention_mask, seq_idx)

    def prefill(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Continue from ``state`` with ``x`` (B, L, D)."""
        y, state = self.mixer.prefill(self.norm(x), state)
        return x + y, state

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Continue from ``state`` with one token a sequence, ``x`` (B, D)."""
        y, state = self.mixer.step(self.norm(x), state)
        return x + y, state


class Backbone(nn.Module):
    """The model without its output head."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.vocab_size, self.residual_in_fp32 = config.known_vocab_size, config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the final normed hidden states.

        Args:
            input_ids: Tokens (B, L), int64.
            attention_mask: (B, L), 1 where a token counts and 0 where it is padding, on either side.
            seq_idx: (B, L) integers, the number of the document a token belongs to, for several documents in one row.
            residuals: A list that the residual stream (B, L, D) after each block is added to.

        Returns:
            Hidden states (B, L, D).

        Raises:
            UserError: If an argument has the wrong shape or type or (on a CPU) a token is outside the vocabulary.
        """
        _check_ids(input_ids, self.vocab_size, dims=2)
        for name, value in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
            if value is not None and value.shape != input_ids.shape:
                raise UserError(
                    f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, not {tuple(value.shape)}"
                )
        if seq_idx is not None:
            if seq_idx.is_floating_point():
                raise UserError(f"seq_idx must be integers (torch.int32), not {seq_idx.dtype}")
            seq_idx = seq_idx.to(torch.int32)
        x = self._embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, seq_idx)
            if residuals is not None:
                residuals.append(x)
        return self.norm_f(x)

    def prefill(self, input_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Continue from ``state`` with ``input_ids`` (B, L); return hidden states (B, L, D) and the new state."""
        _check_ids(input_ids, self.vocab_size, dims=2)
        x = self._embed_after(input_ids, state)
        layers = []
        for layer, memory in zip(self.layers, state.layers, strict=True):
            x, memory = layer.prefill(x, memory)  # type: ignore[operator]
            layers.append(memory)
        return self.norm_f(x), MambaState(tuple(layers))

    def step(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Continue from ``state`` with ``token_ids`` (B,); return hidden states (B, D) and the new state."""
        _check_ids(token_ids, self.vocab_size, dims=1)
        x = self._embed_after(token_ids, state)
        x, layers = step_blocks(cast(Iterable[Block], self.layers), x, state.layers)
        return self.norm_f(x), MambaState(layers)

    def _embed_after(self, ids: Tensor, state: MambaState) -> Tensor:
        if len(state.layers) != len(self.layers):
            raise UserError(f"the state is of {len(state.layers)} blocks and the model has {len(self.layers)}")
        if (expected := state.layers[0].ssm.shape[0]) != ids.shape[0]:
            raise UserError(f"the state is for a batch of {expected} sequences and the tokens are of {ids.shape[0]}")
        return self._embed(ids)

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return at_least_fp32(x) if self.residual_in_fp32 else x


class MambaLM(nn.Module):
    """A Mamba language model.

    Shapes: B batch, L length, D model width, V vocabulary. Parameters: ``backbone.embedding``,
    ``backbone.layers.N.norm``, ``backbone.layers.N.mixer`` (Mamba-1 or Mamba-2, as ``config.mixer`` says),
    ``backbone.norm_f`` and ``lm_head``, whose weight is the embedding's when tied.

    Args:
        config: Sizes and options.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        # A tied head never needs a table of its own, not even for a moment.
        device = "meta" if config.tie_embeddings else None
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, device=device)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> LMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: Tokens (B, L), int64.
            attention_mask: (B, L), 1 where a token counts and 0 where it is padding, on either side.
            seq_idx: (B, L) integers, the number of the document a token belongs to, for several documents in one row.

        Returns:
            An object whose ``logits`` are (B, L, V).

        Raises:
            UserError: If an argument has the wrong shape or type or (on a CPU) a token is outside the vocabulary.
        """
        return LMOutput(self.logits(self.backbone(input_ids, attention_mask, seq_idx)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the backbone's hidden states (..., D)."""
        return self.lm_head(hidden)[..., : self.config.known_vocab_size]

    def init_state(self, batch_size: int) -> MambaState:
        """Return the state of a model that has read nothing, for ``batch_size`` sequences."""
        return MambaState(tuple(cast(Block, layer).mixer.init_state(batch_size) for layer in self.backbone.layers))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Read ``input_ids`` (B, L) as the continuation of ``state``.

        Returns:
            Logits (B, L, V) without gradient, and the new state; the old one may have been overwritten.
        """
        hidden, state = self.backbone.prefill(input_ids, state)
        return self.logits(hidden), state

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Read one token a sequence, ``token_ids`` (B,), as the continuation of ``state``.

        Returns:
            Logits (B, V) without gradient, and the new state; the old one may have been overwritten.
        """
        hidden, state = self.backbone.step(token_ids, state)
        return self.logits(hidden), state

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight (V, D), without the rows that pad the table."""
        return self.lm_head.weight[: self.config.known_vocab_size]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.backbone.norm_f.weight.device

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "MambaLM":
        """Load a model, onto the CPU.

        Args:
            path: A folder of this project (latent or packed), of transformers' Mamba or Mamba2, of state-spaces
                (mamba_ssm) or of the released Bi-Mamba, or a Lightning checkpoint of this project; which it is is told
                by content.

        Raises:
            UserError: If nothing is there, or it is damaged, of another kind, or does not hold exactly the model's
                tensors.
        """
        from bimamba_lit.models.checkpoint import load_lm

        return load_lm(path)

    def save_pretrained(self, path: str | Path, tokenizer: str | None = None) -> None:
        """Write ``config.json`` (with the binarization), ``model.safetensors`` and, if given, ``tokenizer.json``.

        Args:
            path: The folder; created where needed.
            tokenizer: The tokenizer as the JSON text of its ``to_json()``.

        Raises:
            UserError: If the folder cannot be written; what was there is left as it was.
        """
        from bimamba_lit.models.checkpoint import save_lm

        save_lm(self, path, tokenizer)


def _check_ids(ids: Tensor, vocab_size: int, dims: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise UserError(f"token ids must be integers (torch.int64), not {ids.dtype}")
    if ids.dim() != dims:
        shape = {1: "(batch,)", 2: "(batch, length)"}[dims]
        raise UserError(f"token ids must have the shape {shape}, not {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise UserError(f"there are no tokens to read: token ids have the shape {tuple(ids.shape)}")
    # Reading values back would stall a GPU and break tracing, where the embedding has its own check.
    if type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"token id {wrong} is outside the model's vocabulary, 0 to {vocab_size - 1}")
