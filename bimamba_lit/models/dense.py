"""A model's tensors as programs know them that have never heard of binary layers."""

from collections.abc import Collection, Iterator

from torch import Tensor

from bimamba_lit.binarize import check_format, quantized_layers
from bimamba_lit.binarize.apply import QuantizedLinear
from bimamba_lit.models.lm import MambaLM
from bimamba_lit.models.quantized_table import QuantizedEmbedding


def dense_tensors(lm: MambaLM, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a model with dense weights, one after the other; a tied head is left out.

    The weight of a binary layer or of a quantized table is formed when its turn comes.

    Args:
        lm: The model.
        leave_out: Names of layers whose tensors are not wanted.
    """
    check_format(lm, "transformers", leave_out)
    formed: dict[str, QuantizedLinear | QuantizedEmbedding] = dict(quantized_layers(lm))
    formed |= {name: module for name, module in lm.named_modules() if isinstance(module, QuantizedEmbedding)}
    left_out = {*leave_out, *(["lm_head"] if is_tied(lm) else [])}
    skipped = tuple(f"{name}." for name in {*formed, *left_out})
    for name, tensor in lm.state_dict().items():
        if not name.startswith(skipped):
            yield name, tensor
    for name, module in formed.items():
        if name in left_out:
            continue
        yield f"{name}.weight", module.weight.detach()
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            yield f"{name}.bias", bias.detach()


def is_tied(lm: MambaLM) -> bool:
    """Tell whether the output head is the embedding's table."""
    embedding, head = lm.backbone.embedding, lm.lm_head
    if isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedEmbedding):
        return head.table is embedding.table
    return not isinstance(head, QuantizedLinear | QuantizedEmbedding) and head.weight is embedding.weight
