"""The table of launch configurations: which row is taken, and taking another for a while."""

import pytest
import torch

from bimamba_lit.kernels import configurations
from bimamba_lit.kernels.configurations import Configuration, Row, compiling_for, configuration, overriding

CPU = torch.device("cpu")
SMALL, HALF, HOPPER, ANY = (Configuration({"BLOCK": n}) for n in (16, 32, 64, 128))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    rows = (
        Row(SMALL, up_to=4),
        Row(HOPPER, architectures=("sm_90",), itemsize=2),
        Row(HALF, itemsize=2),
        Row(ANY, architectures=("sm_80", "sm_90", "interpreter")),
    )
    monkeypatch.setattr(configurations, "TABLE", {"op/kernel": rows})


@pytest.mark.parametrize(
    ("architecture", "dtype", "size", "expected"),
    [
        ("sm_90", torch.bfloat16, 4, SMALL),
        ("sm_90", torch.float16, 5, HOPPER),
        ("sm_80", torch.float16, 5, HALF),
        ("sm_90", torch.float32, 5, ANY),
        ("interpreter", torch.float32, 5, ANY),
    ],
)
def test_the_first_row_that_matches(architecture, dtype, size, expected):
    with compiling_for(architecture):
        assert configuration("op/kernel", dtype, size, CPU) is expected


def test_a_cpu_is_the_interpreter():
    assert configuration("op/kernel", torch.float32, 5, CPU) is ANY


def test_no_row_is_an_error_that_names_what_was_looked_for():
    with compiling_for("gfx942"), pytest.raises(LookupError, match="op/kernel for 4-byte elements, size 5, on gfx942"):
        configuration("op/kernel", torch.float32, 5, CPU)


def test_overriding_ends():
    other = Configuration({"BLOCK": 8}, num_warps=2, num_stages=3)
    with overriding("op/kernel", other):
        with overriding("op/kernel", ANY):
            assert configuration("op/kernel", torch.float32, 1, CPU) is ANY
        assert configuration("op/kernel", torch.float32, 1, CPU) is other
    assert configuration("op/kernel", torch.float32, 1, CPU) is SMALL
    assert other.launch() == {"BLOCK": 8, "num_warps": 2, "num_stages": 3}
