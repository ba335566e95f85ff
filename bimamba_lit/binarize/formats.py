"""Which formats can hold the layers of a model."""

from collections.abc import Collection

from torch import nn

from bimamba_lit.binarize.apply import quantized_layers
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.errors import UserError


def check_format(model: nn.Module, format: str, leave_out: Collection[str] = ()) -> None:
    """Raise a UserError that names the first layer whose scheme says that ``format`` cannot hold it.

    Args:
        model: The model, its layers latent or packed.
        format: One of those in :attr:`bimamba_lit.binarize.LatentLinear.formats`.
        leave_out: Names of layers that do not matter.
    """
    for name, layer in quantized_layers(model):
        if name in leave_out or isinstance(layer, PTBLinear) or format in layer.formats:
            continue
        raise UserError(
            f"{format} cannot hold {layer.kind()['scheme']} ({name}), which says that it fits "
            f"{', '.join(layer.formats) or 'no format'}"
        )
