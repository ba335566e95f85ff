"""The offline corpus: source text of the standard library, which every Python brings along.

A trial must run with nothing to download. The text is that of the modules named below, a list that holds on Python
3.11 to 3.14: a name is a package folder or one file, whichever the running Python has (``zipfile`` and ``pathlib``
became packages), and all must be there. What the files say differs between Python versions, so runs compare by the
text's SHA-256, not by its name. Left out are tests, idlelib, tkinter, lib2to3, ensurepip and distutils, modules
removed since 3.11, and tables (encodings, locale).
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from bimamba_lit.errors import UserError

MODULES = tuple(
    """
    __future__ _collections_abc _markupbase _pydecimal _pyio _strptime abc argparse ast asyncio base64 bdb bisect bz2
    cProfile calendar cmd code codecs codeop collections colorsys compileall concurrent configparser contextlib copy
    copyreg csv ctypes curses dataclasses datetime dbm difflib dis doctest email enum filecmp fileinput fnmatch
    fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http
    imaplib importlib inspect io ipaddress json keyword linecache logging lzma mailbox mimetypes modulefinder
    multiprocessing netrc ntpath numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform
    plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib
    rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl
    stat statistics string subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit token
    tokenize tomllib trace traceback tracemalloc tty turtle types typing unittest urllib uuid venv warnings wave
    weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
    """.split()
)
SPLITS = ("train", "val", "test")


class OfflineCorpus(NamedTuple):
    """The documents of the offline corpus, one a source file, in order of file name."""

    train: list[str]
    val: list[str]
    test: list[str]

    @property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 bytes of all documents, train, then val, then test."""
        return hashlib.sha256("".join(text for split in self for text in split).encode()).hexdigest()


def offline_files() -> dict[str, list[Path]]:
    """Return the source files of the splits train, val and test, in order of name.

    The first four bytes of the SHA-256 of a file's name (``json/decoder.py``), modulo 100, choose its split: below 4
    is val, below 8 is test.

    Raises:
        UserError: If this Python was installed without the source of one of the modules.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for module in MODULES:
        package, single = root / module, root / f"{module}.py"
        found = sorted(package.rglob("*.py")) if package.is_dir() else [single] if single.is_file() else []
        if not found:
            raise UserError(
                f"the offline corpus is the standard library's source, but {root} has no module '{module}': use a "
                "Python installed with its source files, or name text files instead"
            )
        names += [path.relative_to(root).as_posix() for path in found if path.stat().st_size]
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for name in sorted(name for name in names if not {"test", "tests"} & set(name.split("/"))):
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
        splits["val" if share < 4 else "test" if share < 8 else "train"].append(root / name)
    return splits


def offline_corpus() -> OfflineCorpus:
    """Return the documents of the offline corpus, about 7 MB, with whole files held out for val and test.

    Raises:
        UserError: If this Python was installed without its source files.
    """
    files = offline_files()
    return OfflineCorpus(*([path.read_bytes().decode() for path in files[split]] for split in SPLITS))
