"""Names on the Hugging Face hub, written ``hub:OWNER/NAME``, and local copies of what they name.

What was fetched once is found again in the cache of ``huggingface_hub``, also without a network. Only files that hold
data are fetched, never code: JSON and safetensors, and PyTorch's own files, which are opened as plain tensors and
nothing else, only where a model has no others.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bimamba_lit.errors import UserError

_PREFIX = "hub:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MODEL_FILES = ("*.json", "model.safetensors", "model-*.safetensors")
_PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-*.bin")


def hub_name(text: str) -> str | None:
    """Return ``OWNER/NAME`` of the setting ``hub:OWNER/NAME``, and None of one that has no ``hub:``.

    Raises:
        UserError: If what follows ``hub:`` is not an owner and a name.
    """
    if not text.startswith(_PREFIX):
        return None
    name = text.removeprefix(_PREFIX)
    if not _NAME.fullmatch(name):
        raise UserError(f"'{text}' is not a name on the Hugging Face hub, which is written hub:OWNER/NAME")
    return name


def hub_file(name: str, filename: str) -> Path:
    """Return the local copy of one file of a model repository, fetched unless the cache has it.

    Args:
        name: ``OWNER/NAME``.
        filename: The file's path in the repository.

    Raises:
        UserError: If the hub cannot be reached and the cache lacks the file, or the repository or the file does not
            exist or needs a permission.
    """
    file = _fetched(name, f"file {filename}", [filename]) / filename
    if not file.is_file():
        raise UserError(f"{_PREFIX}{name} has no file {filename}, or the local cache has not and there is no network")
    return file


def hub_folder(name: str) -> Path:
    """Return a local folder with the configuration, tokenizer and weights of a model repository.

    Under torch's ``FakeTensorMode``, where tensors have no values, the weights are left out.

    Args:
        name: ``OWNER/NAME``.

    Raises:
        UserError: If the hub cannot be reached and the cache lacks the model, or the repository does not exist or
            needs a permission.
    """
    from torch._guards import active_fake_mode

    if active_fake_mode() is not None:
        return _fetched(name, "configuration", ["*.json"], ignore=["*/*", "*.index.json"])
    # A pattern's * matches a slash too: without the second list, copies in subfolders would be fetched as well.
    folder = _fetched(name, "model", list(_MODEL_FILES), ignore=["*/*"])
    if any(folder.glob("*.safetensors")):
        return folder
    return _fetched(name, "model", [*_MODEL_FILES, *_PICKLED_FILES], ignore=["*/*"])


def _fetched(name: str, what: str, allow: list[str], ignore: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    with _told(name, what):
        # For a single file too: `hf_hub_download` tries for half a minute before it says that there is no network.
        return Path(snapshot_download(name, allow_patterns=allow, ignore_patterns=ignore))


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{_PREFIX}{name} is only open to those who accepted its terms: accept them at huggingface.co/{name} and "
            f"log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{_PREFIX}{name} is not on the Hugging Face hub, or is private: check the spelling, or log in with "
            f"`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_unreachable(name, what)) from error
    except Exception as error:  # which HTTP library lies below, and so the rest, changes with huggingface_hub
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot fetch {_PREFIX}{name} from the Hugging Face hub: {first[0]}") from error


def _unreachable(name: str, what: str) -> str:
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
    return (
        f"{_PREFIX}{name}: {why} and the {what} is not in the local cache; give "
        f"the path of a local copy, or fetch it once where there is a network"
    )
