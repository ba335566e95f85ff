"""How far a model's other forms are from its full forward pass: ``prefill`` and ``step``, and packed layers."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, Sign, pack_

WIDTH, VOCABULARY = 128, 512
MIXERS = {"mamba2": "Mamba-2", "mamba": "Mamba-1"}


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def model_accuracy() -> list[tuple[str, float]]:
    """Return rows of a name and a relative error, max |found - right| / max |right|, in fp32 on the CPU.

    The models have two layers of width 128 and read 300 tokens; the layers are of the paper's 780M ``in_proj`` shape.
    """
    rows = []
    for mixer, title in MIXERS.items():
        torch.manual_seed(0)
        lm = MambaLM(MambaConfig(d_model=WIDTH, n_layer=2, vocab_size=VOCABULARY, mixer=mixer)).eval()
        rows += [(f"{title}: {name}", error) for name, error in _other_forms(lm)]
        if (peer := _transformers(mixer, lm)) is not None:
            rows += [(f"{title}: {name}", error) for name, error in _beside(lm, peer)]
    return rows + _packed()


@torch.no_grad()
def _other_forms(lm: MambaLM) -> list[tuple[str, float]]:
    ids = torch.randint(VOCABULARY, (2, 300))
    full = lm(ids).logits
    first, state = lm.prefill(ids[:, :150], lm.init_state(2))
    second, state = lm.prefill(ids[:, 150:], state)
    pieces = _relative(torch.cat([first, second], 1), full)
    state, stepped = lm.init_state(2), []
    for token in ids.unbind(1):
        logits, state = lm.step(token, state)
        stepped.append(logits)
    steps = _relative(torch.stack(stepped, 1), full)
    return [("prefill in two pieces against forward", pieces), ("step by step against forward", steps)]


@torch.no_grad()
def _packed() -> list[tuple[str, float]]:
    rows = []
    x = torch.randn(4, 1536)
    for scheme in (Sign, ScaledSign, FBI):
        model = nn.Sequential(scheme(nn.Linear(1536, 6448, bias=False)))
        trained = model(x)
        rows.append((f"packed {scheme.__name__} layer against trained", _relative(pack_(model)(x), trained)))
    return rows


def _transformers(mixer: str, lm: MambaLM) -> nn.Module | None:
    """Return transformers' model with the same weights, or None where it is not installed."""
    if find_spec("transformers") is None:
        return None
    import transformers

    transformers.utils.logging.set_verbosity_error()
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    if mixer == "mamba":
        peer: nn.Module = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        heads: dict[str, Any] = {"head_dim": 64, "num_heads": 2 * WIDTH // 64, "n_groups": 1, "state_size": 128}
        peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads))
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in lm.state_dict().items()}
    peer.load_state_dict(weights)
    return peer


def _beside(lm: MambaLM, peer: nn.Module) -> list[tuple[str, float]]:
    ids = torch.randint(VOCABULARY, (2, 100))
    direction = torch.randn(2, 100, VOCABULARY)
    logits = [model(ids).logits for model in (lm, peer)]
    for one in logits:
        (one * direction).sum().backward()
    theirs = dict(peer.named_parameters())
    errors = [
        _relative(parameter.grad, theirs[name.replace("backbone.embedding.", "backbone.embeddings.")].grad)  # type: ignore[arg-type]
        for name, parameter in lm.named_parameters()
    ]
    return [
        ("logits against transformers", _relative(logits[0].detach(), logits[1].detach())),
        ("worst gradient of any parameter against transformers", max(errors)),
    ]
