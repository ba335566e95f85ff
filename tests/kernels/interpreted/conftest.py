"""Runs each file of this folder in a process of its own, in Triton's interpreter, on a CPU.

Triton reads TRITON_INTERPRET when it is imported, and the setting must not reach other tests. To choose among a file's
tests, set it yourself: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted/test_OP.py -k NAME``.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class InInterpreter(pytest.Item):
    """All tests of one file, in a process of their own."""

    def runtest(self):
        chosen = ["-m", expression] if (expression := self.config.getoption("markexpr")) else []
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(self.path)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)

    def reportinfo(self):
        return self.path, 0, self.name


class InterpretedFile(pytest.File):
    """A file whose tests are one item here."""

    def collect(self):
        yield InInterpreter.from_parent(self, name="in_interpreter")


def pytest_pycollect_makemodule(module_path, parent):
    if INTERPRETED:
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch):
    """Round float32 to bfloat16 as devices do; Triton 3.7.1's interpreter cuts off, which is three times as wrong."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(numbers, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(numbers, source, target, mode)
        return torch.from_numpy(numpy.array(numbers)).to(torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel must write holds NaN or the farthest integer before."""
    empty = torch.empty

    def poison(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)
