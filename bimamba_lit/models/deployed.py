"""A model as it is run where it is deployed: packed, and in bfloat16."""

import torch

from bimamba_lit.binarize import LatentLinear, pack_
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.models.lm import MambaLM

_ALWAYS_WIDE = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")  # rounded, they would change the slowest decays


def deployed_(lm: MambaLM) -> MambaLM:
    """Pack the binary layers of ``lm`` and round what is in full precision to bfloat16, but for its scan, in place."""
    layers = [layer for layer in lm.modules() if isinstance(layer, LatentLinear | PTBLinear)]
    if layers and all(map(_packs, layers)):
        pack_(lm)
    for layer in lm.modules():
        if isinstance(layer, PTBLinear):
            layer.to(torch.bfloat16)  # the dense weight that it keeps; what is stored stays as it is
    for name, parameter in lm.named_parameters():
        if not name.endswith(_ALWAYS_WIDE):
            parameter.data = parameter.data.to(torch.bfloat16)
    return lm.eval()


def _packs(layer: LatentLinear | PTBLinear) -> bool:
    return layer.unfinished is None if isinstance(layer, LatentLinear) else layer.terms() is not None
