"""Models of this project in lm-eval (EleutherAI's lm-evaluation-harness), under the name ``bimamba``.

Requests are tokenized, cut and windowed as lm-eval's own Hugging Face backend does, so that figures compare. What
differs is how they are computed: the answers to one question share its text, which is read once, and each answer goes
on from the state that reading left. Texts of one length are read together, without padding.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from bimamba_lit.data.tokenizer import TextTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.eval.metrics import CHUNK_TOKENS
from bimamba_lit.eval.reader import load_reader
from bimamba_lit.models import MambaLM
from bimamba_lit.models.generate import generate
from bimamba_lit.models.state import LayerState, MambaState

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text, then as ids."""
_NEW_TOKENS = 256
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature"}


@register_model("bimamba")
class BimambaLM(TemplateLM):
    """A model with its tokenizer, as lm-eval asks it.

    Args:
        pretrained: A run folder, a checkpoint, a folder that ``MambaLM.from_pretrained`` takes or ``hub:OWNER/NAME``;
            or a loaded model.
        tokenizer: Its tokenizer (needed beside a loaded model), or the name of one to use instead of the saved one.
        batch_size: Continuations at a time; ``auto`` is 16.
        max_batch_size: Not used; lm-eval passes it.
        device: Where to compute; a GPU by default if there is one. A loaded model stays where it is.
        max_length: Tokens of a window: longer texts are cut from the left, as in lm-eval's other backends.

    Raises:
        UserError: If the model or its tokenizer cannot be read, or an argument is out of range.
    """

    def __init__(
        self,
        pretrained: str | Path | MambaLM,
        tokenizer: str | TextTokenizer | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, MambaLM):
            if tokenizer is None or isinstance(tokenizer, str):
                raise UserError("a loaded model needs its tokenizer beside it, loaded as well")
            self.lm, self.text_tokenizer = pretrained.eval(), tokenizer
        else:
            if tokenizer is not None and not isinstance(tokenizer, str):
                raise UserError("a model that is named by its path takes a tokenizer by its path or name")
            self.lm, self.text_tokenizer = load_reader(pretrained, tokenizer)
            self.lm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = _batch_size(batch_size)
        self.max_length = int(max_length)
        if self.max_length < 1:
            raise UserError(f"max_length: {max_length} is out of range, the least is 1")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lm.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and stands before a text without context."""
        if (separator := self.text_tokenizer.separator) is None:
            raise UserError(
                "the tokenizer has no token that ends a text, such as <|endoftext|>, which this task puts first"
            )
        return separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; special tokens are never added."""
        return self.text_tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats, window after window; every token counts once."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((("", ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model adds to each text, up to the first of the strings that end it."""
        texts = [""] * len(requests)
        alike: dict[tuple[str, int], list[tuple[int, list[int]]]] = defaultdict(list)
        for index, request in enumerate(requests):
            prompt, settings = request.args
            room = max(1, self.max_length - int(settings.get("max_gen_toks", _NEW_TOKENS)))
            ids = (self.tok_encode(prompt) or [self.eot_token_id])[-room:]
            alike[json.dumps(settings, sort_keys=True), len(ids)].append((index, ids))
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for (settings_json, _), group in alike.items():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    added = self._generate([ids for _, ids in batch], json.loads(settings_json))
                    for (index, _), text in zip(batch, added, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = bool(settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0))
        if sampled and (unknown := sorted(settings.keys() - _GENERATION)):
            raise UserError(f"sampling with {unknown[0]} is not supported; there are {', '.join(sorted(_GENERATION))}")

        def finished(added: Tensor) -> bool:
            return all(whole for _, whole in map(cut, added.tolist()))

        def cut(ids: list[int]) -> tuple[str, bool]:
            end = self.text_tokenizer.separator
            ended = end in ids
            text = self.text_tokenizer.decode(ids[: ids.index(end)] if ended and end is not None else ids)
            found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            return text[: min(found, default=len(text))], ended or bool(found)

        out = generate(
            self.lm,
            torch.tensor(prompts),
            int(settings.get("max_gen_toks", _NEW_TOKENS)),
            float(settings.get("temperature", 1.0)) if sampled else 0.0,
            done=finished,
        )
        return [cut(ids)[0] for ids in out[:, len(prompts[0]) :].tolist()]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm) as bar:
            for contexts in self._batches(requests):
                indices = [index for _, group in contexts for index in group]
                scored = self._score(
                    [(context, [requests[index][2] for index in group]) for context, group in contexts]
                )
                for index, answer in zip(indices, scored, strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(indices))
        return answers

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Yield contexts of one length, each with the numbers of its requests, about batch_size requests at a time."""
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens and max_length is {self.max_length}: raise it"
                )
            sharing[tuple(context[-room:])].append(index)
        groups = [
            (context, indices[start : start + self.batch_size])
            for context, indices in sharing.items()
            for start in range(0, len(indices), self.batch_size)
        ]
        groups.sort(key=lambda group: (len(group[0]), len(requests[group[1][0]][2])), reverse=True)
        for _, alike in groupby(groups, key=lambda group: len(group[0])):
            batch: list[tuple[tuple[int, ...], list[int]]] = []
            for group in alike:
                if batch and sum(len(indices) for _, indices in batch) + len(group[1]) > self.batch_size:
                    yield batch
                    batch = []
                batch.append(group)
            yield batch

    @torch.no_grad()
    def _score(self, contexts: list[tuple[tuple[int, ...], list[list[int]]]]) -> list[tuple[float, bool]]:
        """Return for each continuation of each context its log-likelihood and whether each token is the likeliest."""
        device, backbone = self.device, self.lm.backbone
        read = torch.tensor([context for context, _ in contexts], device=device)
        hidden, state = backbone.prefill(read, self.lm.init_state(len(contexts)))
        of = torch.tensor([row for row, (_, some) in enumerate(contexts) for _ in some], device=device)
        continuations = [ids for _, some in contexts for ids in some]
        lengths = [len(ids) for ids in continuations]
        longest = max(1, *lengths)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in continuations], device=device)
        predicting = hidden[:, -1:][of]
        if longest > 1:
            # What a short one is padded with comes after all that is read of it.
            copied = MambaState(tuple(LayerState(layer.conv[of], layer.ssm[of]) for layer in state.layers))
            after, _ = backbone.prefill(padded[:, :-1], copied)
            predicting = torch.cat([predicting, after], dim=1)
        counted = torch.arange(longest, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
        nats, likeliest = self._log_likelihoods(predicting[counted], padded[counted])
        return [
            (float(some.double().sum()), bool(first.all()))
            for some, first in zip(nats.split(lengths), likeliest.split(lengths), strict=True)
        ]

    def _log_likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return of hidden states (T, D) and the ids (T,) after them log-likelihoods (T,) and which are likeliest."""
        nats, likeliest = [targets.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
        for states, ids in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            logits = self.lm.logits(states).float()
            nats.append(logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1))
            likeliest.append(logits.argmax(-1) == ids)
        return torch.cat(nats), torch.cat(likeliest)


def _batch_size(value: int | str) -> int:
    text = str(value)
    if text.startswith("auto"):
        return 16
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size: {value!r} is not a whole number above 0, nor 'auto'")
    return int(text)
