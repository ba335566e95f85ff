"""A model from any form that is read here to another one that is read here too."""

from pathlib import Path

from bimamba_lit.distill import find_checkpoint
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.export.safetensors import export_safetensors
from bimamba_lit.export.state_spaces import export_bi_mamba, export_state_spaces
from bimamba_lit.export.transformers_folder import export_transformers
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json

_WRITERS = {
    "packed": export_safetensors,
    "transformers": export_transformers,
    "state-spaces": export_state_spaces,
    "bi-mamba": export_bi_mamba,
}
FORMS = ("latent", *_WRITERS)


def convert(source: str | Path, target: str | Path, form: str = "latent", dtype: str | None = None) -> None:
    """Read a model and write it as a folder of another form; its tokenizer goes along.

    Args:
        source: A run folder, a checkpoint, a model's folder in any form that is read, or ``hub:OWNER/NAME``.
        target: The folder to write.
        form: "latent" (this project's, every tensor as it is), "packed", "transformers", "state-spaces" (mamba_ssm's)
            or "bi-mamba" (the released Bi-Mamba's).
        dtype: What tensors are rounded to where the form rounds; its own default if None.

    Raises:
        UserError: If the source cannot be read, the form cannot hold the model, or the target cannot be written.
    """
    if form not in FORMS:
        raise UserError(f"there is no form '{form}'{nearest(form, FORMS) or '; there are ' + ', '.join(FORMS)}")
    if form == "latent" and dtype is not None:
        raise UserError("the form 'latent' keeps every tensor in its own type; leave out the dtype")
    checkpoint = find_checkpoint(source)
    if Path(target).resolve() in (Path(source).resolve(), checkpoint.resolve()):
        raise UserError(f"{target} is the model that is to be converted; give another folder")
    lm = load_lm(checkpoint).eval()
    tokenizer = load_tokenizer_json(checkpoint)
    if form == "latent":
        lm.save_pretrained(target, tokenizer)
        return
    options = {} if dtype is None else {"dtype": dtype}
    _WRITERS[form](lm, target, tokenizer, **options)
