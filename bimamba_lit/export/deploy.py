"""Whether a model fits where it is to go, told before it is trained."""

from collections.abc import Sequence

from bimamba_lit.binarize import check_format
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.export import FORMATS
from bimamba_lit.models import MambaLM


def check_deploy(lm: MambaLM, formats: Sequence[str]) -> None:
    """Check that every format can hold a model.

    Args:
        lm: The model, binarized as it is to be trained.
        formats: Names of ``bimamba_lit.export.FORMATS``.

    Raises:
        UserError: If a format is not known or cannot hold a layer: the first such one is named.
    """
    for format in formats:
        if format not in FORMATS:
            raise UserError(f"deploy: there is no format '{format}'{nearest(format, FORMATS)}")
        try:
            check_format(lm, format)
        except UserError as error:
            raise UserError(f"deploy: {error}") from error
        if format == "gguf":
            from bimamba_lit.export.gguf import check_gguf

            try:
                check_gguf(lm)
            except UserError as error:
                raise UserError(f"deploy: gguf cannot hold the model: {error}") from error
