"""PyTorch's own files (``torch.save``), opened as plain tensors and values and nothing else.

``weights_only=True`` keeps a pickle from running code, and tensors stay in the memory-mapped file until copied. What is
left to guard against is a small file that asks for much memory: records are required to lie in the file as they are,
uncompressed, so that no record is larger than the file, and ``bytearray``, which allocates as many bytes as it is told
and which no checkpoint needs, is refused. The checksums of the records are those of the zip format.
"""

import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from bimamba_lit.errors import UserError

_BYTEARRAY = (b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n")  # how a pickle names it
_OF_A_PROGRAM = ("constants.pkl", "archive_format")  # what torch.jit.save and torch.export.save write beside tensors
_LARGEST_STRUCTURE = 1 << 28  # bytes of a checkpoint's pickle, which holds names and shapes but no tensor


def load_plain(file: Path, wanted: str) -> Any:
    """Return the content of a PyTorch file, its tensors on the CPU and memory-mapped.

    Args:
        file: The file.
        wanted: What would be right, told when it is not.

    Raises:
        UserError: If it holds more than tensors and plain values, is damaged, or is no PyTorch file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if (fault := _fault(archive, file.stat().st_size)) is not None:
                raise UserError(f"{file} {fault}; give {wanted}")
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} {_NOT_PLAIN}; give {wanted}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"{file} is no checkpoint, or is damaged or cut short; give {wanted}") from error


def check_plain(data: bytes) -> None:
    """Hold a PyTorch file that lies in memory, such as a part of another file, to the same.

    Raises:
        Exception: Whatever its bytes happen to ask for, if it is anything else.
    """
    with zipfile.ZipFile(BytesIO(data)) as archive:
        if (fault := _fault(archive, len(data))) is not None:
            raise UserError(f"it {fault}")
    torch.load(BytesIO(data), weights_only=True)


_NOT_PLAIN = "is not a checkpoint of plain tensors and values, and nothing else is opened"


def _fault(archive: zipfile.ZipFile, size: int) -> str | None:
    """Return what keeps an archive of so many bytes from being opened; None if nothing does."""
    records = archive.infolist()
    if any(record.filename.partition("/")[2] in _OF_A_PROGRAM for record in records):
        return "is an export, a program for torch alone to run, and is not read back"
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size > size for record in records):
        return "is compressed or damaged: PyTorch stores its records as they are"
    if not all(_is_harmless(archive, record) for record in records if record.filename.endswith("/data.pkl")):
        return _NOT_PLAIN
    damaged = archive.testzip()
    return None if damaged is None else f"is damaged: {damaged} in it does not have its checksum"


def _is_harmless(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    if record.file_size > _LARGEST_STRUCTURE:
        return False
    structure = archive.read(record)
    return not any(name in structure for name in _BYTEARRAY)
