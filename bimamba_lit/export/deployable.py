"""What TorchScript and ``torch.export`` share: the deployed model of their options, and the extra files inside."""

import json
from typing import Any

import bimamba_lit
from bimamba_lit.errors import UserError
from bimamba_lit.export.deployed_model import DeployedLM
from bimamba_lit.export.options import stored_dtype
from bimamba_lit.models import MambaLM


def deployable(lm: MambaLM, dtype: str, embedding: str | None) -> DeployedLM:
    """Return the deployed form of a model, in evaluation mode and not prepared.

    Args:
        lm: The model: latent, packed or in full precision.
        dtype: What everything that is not a sign is stored in, by name.
        embedding: ``int8``, or None for ``dtype``.

    Raises:
        UserError: If a name is wrong or a weight is not finite in ``dtype``.
    """
    if embedding not in (None, "int8"):
        raise UserError(f"the embedding is stored in --dtype or as int8 here, not as '{embedding}'")
    return DeployedLM(lm, stored_dtype(dtype), embedding == "int8").eval()


def extra_files(model: DeployedLM, tokenizer_json: str | None, **more: Any) -> dict[str, str]:
    """Return what travels inside the file: ``model.json`` and, where there is one, ``tokenizer.json``."""
    about = {"format": "bimamba-lit", "version": bimamba_lit.__version__}
    about |= {"config": json.loads(model.config), "scheme": json.loads(model.scheme), **more}
    return {"model.json": json.dumps(about)} | ({} if tokenizer_json is None else {"tokenizer.json": tokenizer_json})
