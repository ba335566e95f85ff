"""TorchScript: one file for ``torch.jit.load``, in Python or C++, in a process that has never heard of this package.

PyTorch calls TorchScript deprecated and still loads it; :mod:`pt2` is the way on. A script can hold no op that Python
registers, so the model is written once more in plain tensor operations (:mod:`deployed_model`), and unpacks its 1-bit
weights by itself where it is loaded.
"""

import io
import warnings
from pathlib import Path

import torch

from bimamba_lit.export.deployable import deployable, extra_files
from bimamba_lit.export.options import check_is_file
from bimamba_lit.files import replacing
from bimamba_lit.models import MambaLM


def export_torchscript(
    lm: MambaLM, out: Path, tokenizer_json: str | None, dtype: str = "float16", embedding: str | None = None
) -> None:
    """Write a model as TorchScript.

    The loaded module has `forward`, `init_state`, `prefill`, `step`, `generate` and `prepare`, documented at
    `DeployedLM`, and ``config`` and ``scheme`` as JSON. The extra files ``model.json`` and, where there is a tokenizer,
    ``tokenizer.json`` travel inside.

    Args:
        lm: The model: latent, packed or in full precision.
        out: The file to write.
        tokenizer_json: The tokenizer as the JSON text of its ``to_json()``.
        dtype: What everything that is not a sign is stored in.
        embedding: ``int8`` stores the embedding and the head as 8-bit integers with a scale a row.

    Raises:
        UserError: If an option is wrong, a weight does not fit ``dtype``, or the file cannot be written.
    """
    check_is_file(out, "torchscript")
    deployed = deployable(lm, dtype, embedding)
    files = extra_files(deployed, tokenizer_json, dtype=dtype, embedding=embedding)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated.*")
        scripted = torch.jit.script(deployed)
        # Through memory: where a disk is full, PyTorch's own writer ends the whole process.
        content = io.BytesIO()
        torch.jit.save(scripted, content, _extra_files=files)
    with replacing(out) as temporary:
        temporary.write_bytes(content.getvalue())
