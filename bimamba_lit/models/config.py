"""The shape of a Mamba language model, in mamba_ssm's field names."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bimamba_lit.errors import UserError, nearest

_DEFAULT_D_STATE = {"mamba2": 128, "mamba": 16}


@dataclass
class MambaConfig:
    """Sizes and options of a Mamba language model.

    Args:
        d_model: Width D of the residual stream.
        n_layer: Number of blocks, one mixer each.
        vocab_size: Number of tokens V the model knows; logits have this many columns. Left out of a recipe, it follows
            the data's tokenizer.
        d_state: State size N, of each head in Mamba-2 and of each channel in Mamba-1; 128 and 16 when not given. Where
            both kinds are mixed, None stands for the default of either.
        d_conv: Width of the causal convolution before the scan, in tokens.
        expand: Inner width of a mixer as a multiple of d_model.
        headdim: Width P of a Mamba-2 head; divides expand * d_model.
        ngroups: Number G of groups of Mamba-2 heads that share B and C; divides the number of heads.
        chunk_size: Tokens a chunk of Mamba-2's scan; changes speed and memory, not results.
        norm_eps: Added to the mean square in every RMS norm.
        residual_in_fp32: Keep the residual stream in fp32 when the weights are in half precision.
        tie_embeddings: Share one table between the embedding and the output head.
        pad_vocab_size_multiple: The embedding table gets rows up to the next multiple of this; logits do not.
        mixer: The mixer of every block, "mamba2" or "mamba" (Mamba-1), or a list of one a block.
        dt_rank: Rank of Mamba-1's step sizes; d_model / 16, rounded up, when not given.

    Raises:
        UserError: If a value is of the wrong type or out of range, or two values do not fit together.
    """

    d_model: int
    n_layer: int
    vocab_size: int | None = None
    d_state: int | None = None
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    mixer: str | list[str] = "mamba2"
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if name in _MAY_BE_NONE and value is None:
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a positive integer, not {value!r}")
        for name in ("residual_in_fp32", "tie_embeddings"):
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {value!r}")
        if isinstance(self.norm_eps, bool) or not isinstance(self.norm_eps, (int, float)) or not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps must be a number between 0 and 1, not {self.norm_eps!r}")
        self._check_mixer()
        kinds = self._kinds
        if "mamba" in kinds and self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)
        if "mamba2" in kinds:
            self._check_heads()
        if self.d_state is None and len(kinds) == 1:
            self.d_state = _DEFAULT_D_STATE[kinds.pop()]

    def _check_mixer(self) -> None:
        if isinstance(self.mixer, list) and len(self.mixer) != self.n_layer:
            raise UserError(
                f"mixer lists {len(self.mixer)} mixers for n_layer = {self.n_layer} blocks; give one a block"
            )
        for mixer in self.mixer if isinstance(self.mixer, list) else [self.mixer]:
            if not isinstance(mixer, str) or mixer not in _DEFAULT_D_STATE:
                raise UserError(f'mixer must be "mamba2" or "mamba", or a list of them, not {mixer!r}')

    def _check_heads(self) -> None:
        if self.d_inner % self.headdim:
            raise UserError(
                f"headdim must divide expand * d_model, and {self.headdim} does not divide "
                f"{self.expand} * {self.d_model} = {self.d_inner}"
            )
        if self.nheads % self.ngroups:
            raise UserError(
                f"ngroups must divide the number of heads, expand * d_model / headdim = {self.nheads}, "
                f"and {self.ngroups} does not"
            )

    @property
    def _kinds(self) -> set[str]:
        """The kinds of mixers, without a list as long as ``n_layer``, which nothing has checked against a model yet."""
        return set(self.mixer if isinstance(self.mixer, list) else [self.mixer])

    @property
    def mixers(self) -> list[str]:
        """The mixer of each block."""
        return self.mixer if isinstance(self.mixer, list) else [self.mixer] * self.n_layer

    def of_layer(self, layer: int) -> "MambaConfig":
        """Return the configuration of one block's mixer, with its own default of ``d_state``."""
        return replace(self, mixer=self.mixers[layer])

    @property
    def d_inner(self) -> int:
        """Inner width of a mixer, ``expand * d_model``."""
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        """Number H of heads of a Mamba-2 mixer."""
        return self.d_inner // self.headdim

    @property
    def known_vocab_size(self) -> int:
        """``vocab_size``, once it is known.

        Raises:
            UserError: If it is not.
        """
        if self.vocab_size is None:
            raise UserError("vocab_size is not set: give the number of tokens that the tokenizer has")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: ``vocab_size`` up to the next multiple of ``pad_vocab_size_multiple``."""
        return -(-self.known_vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MambaConfig":
        """Build a configuration from plain types.

        Raises:
            UserError: If a key is unknown (the nearest right one is named) or missing, or a value is wrong.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"the model configuration has no key {key!r}{nearest(str(key), names)}")
        for key in ("d_model", "n_layer", "vocab_size"):
            if key not in values:
                raise UserError(f"the model configuration lacks the key '{key}'")
        return cls(**values)


_MAY_BE_NONE = ("vocab_size", "d_state", "dt_rank")
_POSITIVE = (
    "d_model",
    "n_layer",
    "vocab_size",
    "d_state",
    "d_conv",
    "expand",
    "headdim",
    "ngroups",
    "chunk_size",
    "pad_vocab_size_multiple",
    "dt_rank",
)
