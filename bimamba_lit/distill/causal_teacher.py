"""Any causal language model of transformers as a teacher, such as the paper's LLaMA-2-7B."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode

from bimamba_lit.errors import UserError

_PROBE_LENGTH = 8
_TOLERANCE = 1e-5


class CausalTeacher(nn.Module):
    """A frozen transformers model, taken apart into a backbone and a head as ``MambaLM`` is.

    Args:
        path: A folder that ``AutoModelForCausalLM.from_pretrained`` takes. Only safetensors are read and no code of the
            folder's is run. Weights keep the dtype that they are stored in. Under torch's ``FakeTensorMode``, where
            tensors have no values, only the configuration is read.

    Raises:
        UserError: If transformers is not installed, the folder is not one of a causal language model or lacks a file,
            or the model's logits are more than its head times its last hidden states.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        values = active_fake_mode() is None
        self._model = (_load if values else _outline)(Path(path))
        head = self._model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise UserError(
                f"the teacher {path}, a {type(self._model).__name__}, has no plain output head without bias"
            )
        self._body: nn.Module = self._model.base_model
        self._head = head.weight
        self._takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters
        self.config = SimpleNamespace(vocab_size=self._head.shape[0])
        if values:
            self._check_head(path)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight (V, D_t)."""
        return self._head[: self.config.vocab_size]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self._head.device

    @torch.no_grad()
    def backbone(self, input_ids: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Return the last hidden states (B, L, D_t), those that the head multiplies.

        Args:
            input_ids: Tokens (B, L), int64.
            seq_idx: Document of each token (B, L); tokens see their own document only and count their positions in it.

        Raises:
            UserError: With seq_idx, if the model takes no positions, so that documents cannot be kept apart.
        """
        options: dict[str, Any] = {"use_cache": False}
        if seq_idx is not None:
            if not self._takes_positions:
                raise UserError(
                    f"the teacher, a {type(self._model).__name__}, cannot keep documents apart: "
                    "set data.init_args.separate_documents to false"
                )
            # Without a mask, transformers takes positions that start afresh for documents apart, and makes the mask
            # itself: one that knows of windows and whatever else the model's attention has.
            options["position_ids"] = _positions(seq_idx)
        hidden: Tensor = self._body(input_ids, **options).last_hidden_state
        return hidden

    @torch.no_grad()
    def _check_head(self, path: str | Path) -> None:
        ids = torch.arange(min(_PROBE_LENGTH, self.config.vocab_size), device=self.device)[None]
        logits = self._model(ids, use_cache=False).logits
        found = F.linear(self.backbone(ids), self._head)
        capped = getattr(self._model.config, "final_logit_softcapping", None) is not None
        if capped or found.shape != logits.shape or (found - logits).abs().max() > _TOLERANCE * logits.abs().max():
            raise UserError(
                f"the teacher {path}, a {type(self._model).__name__}, does more to its logits than multiply its last "
                "hidden states by its head (such as soft-capping), so it cannot be distilled from"
            )


def _load(path: Path) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"the teacher {path} needs transformers: pip install 'bimamba-lit[hf]'") from error
    shown, with_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot read the teacher {path} as a causal language model: {reason}") from error
    finally:
        logging.set_verbosity(shown)
        if with_bar:
            logging.enable_progress_bar()
    model, read = loaded
    if missing := sorted(read["missing_keys"]):
        raise UserError(
            f"the teacher {path} lacks {len(missing)} tensors of a {type(model).__name__}: {missing[0]} ..."
        )
    return model.eval().requires_grad_(False)


def _outline(path: Path) -> Any:
    """Return a model of the folder's configuration, in the type that it is stored in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    return model.eval().requires_grad_(False)


def _positions(seq_idx: Tensor) -> Tensor:
    """(B, L) documents -> the position of each token in its document (B, L)."""
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return place - torch.where(begins, place, 0).cummax(1).values
