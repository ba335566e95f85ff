"""How far a model's other forms are from its full forward pass: ``prefill`` and ``step``, and packed layers."""

import torch
from torch import Tensor, nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, Sign, pack_


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


@torch.no_grad()
def model_accuracy() -> list[tuple[str, float]]:
    """Return rows of a name and a relative error, max |found - right| / max |right|, in fp32 on the CPU.

    The model has two layers of width 128 and reads 300 tokens; the layers are of the paper's 780M ``in_proj`` shape.
    """
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=128, n_layer=2, vocab_size=512, d_state=64)).eval()
    ids = torch.randint(512, (2, 300))
    full = lm(ids).logits
    first, state = lm.prefill(ids[:, :150], lm.init_state(2))
    second, state = lm.prefill(ids[:, 150:], state)
    rows = [("prefill in two pieces against forward", _relative(torch.cat([first, second], 1), full))]
    state, stepped = lm.init_state(2), []
    for token in ids.unbind(1):
        logits, state = lm.step(token, state)
        stepped.append(logits)
    rows.append(("step by step against forward", _relative(torch.stack(stepped, 1), full)))
    x = torch.randn(4, 1536)
    for scheme in (Sign, ScaledSign, FBI):
        model = nn.Sequential(scheme(nn.Linear(1536, 6448, bias=False)))
        trained = model(x)
        rows.append((f"packed {scheme.__name__} layer against trained", _relative(pack_(model)(x), trained)))
    return rows
