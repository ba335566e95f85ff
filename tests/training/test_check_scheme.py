"""The shipped schemes conform; a scheme that breaks one promise is told by that promise."""

import pytest
import torch
from torch import Tensor, nn

from bimamba_lit.binarize import BinaryLinear, known_schemes, no_decay
from bimamba_lit.training import check_scheme
from bimamba_lit.training.check_scheme import INPUTS, OUTPUTS, findings_of

SHIPPED = sorted(
    (scheme for scheme in known_schemes().values() if scheme.__module__.startswith("bimamba_lit.")),
    key=lambda one: one.__name__,
)


@pytest.fixture
def no_exports(monkeypatch):
    """Leave out the exports, which are told, never wrong, and slow."""
    monkeypatch.setattr(check_scheme, "_exports", lambda scheme: [])


@pytest.mark.parametrize("scheme", SHIPPED, ids=lambda scheme: scheme.__name__)
def test_shipped_schemes_conform(scheme, no_exports):
    findings = findings_of(scheme)
    assert len(findings) >= 8
    assert [finding for finding in findings if finding.passed is False] == []


class Scaled(BinaryLinear):
    """Right: what the broken ones below are made from."""

    def __init__(self, linear: nn.Linear, factor: float = 1.0) -> None:
        super().__init__(linear)
        self.factor = factor
        self.row = no_decay(factor * self.latent.detach().abs().mean(1))

    def terms(self) -> dict[str, Tensor]:
        return {"out_scale": self.row}


class LosesBias(Scaled):
    def __init__(self, linear, factor=1.0):
        super().__init__(linear, factor)
        self.bias = None


class OtherWeight(Scaled):
    @property
    def weight(self):
        return 2 * super().weight


class Detached(Scaled):
    def terms(self):
        return {"out_scale": self.row.detach()}


class WrongSlope(Scaled):
    def terms(self):
        return {"out_scale": 2 * self.row - self.row.detach()}


class ForgetsOption(Scaled):
    def __init__(self, linear, factor=2.0):
        super().__init__(linear, factor)
        self.factor = 1.0


class TensorOption(Scaled):
    def __init__(self, linear, factor=None):
        super().__init__(linear)
        self.factor = torch.ones(1)


class Flatters(Scaled):
    def storage(self):
        return {**super().storage(), "out_scale": 0}


class Noisy(Scaled):
    def terms(self):
        return {"out_scale": self.row * (1 + 0.1 * torch.rand(()))}


class Counts(Scaled):
    """Keeps state outside of parameters and buffers, which no checkpoint holds."""

    def __init__(self, linear, factor=1.0):
        super().__init__(linear, factor)
        self.calls = 0

    def terms(self):
        self.calls += self.training
        return {"out_scale": self.row * (1.0 + 0.1 * self.calls)}


@pytest.mark.parametrize(
    ("scheme", "question"),
    [
        (LosesBias, "takes over"),
        (OtherWeight, "its weight is"),
        (Detached, "gradients"),
        (WrongSlope, "gradients"),
        (ForgetsOption, "options"),
        (TensorOption, "options"),
        (Flatters, "the bits it reports"),
        (Noisy, "packed"),
        (Counts, "a resumed run"),
    ],
)
def test_a_broken_promise_is_told(scheme, question, no_exports):
    failed = [finding.question for finding in findings_of(scheme) if finding.passed is False]
    assert any(one.startswith(question) for one in failed), failed


class NotFinite(Scaled):
    def terms(self):
        return {"out_scale": self.row * float("nan")}


def test_a_weight_that_is_not_finite_is_all_that_is_told():
    (finding,) = findings_of(NotFinite)
    assert (finding.passed, finding.question) == (False, "its weight is finite")
    assert finding.answer == f"of {OUTPUTS * INPUTS} values, {OUTPUTS * INPUTS} are NaN or infinite"


OWN = """
from bimamba_lit.binarize import BinaryLinear

class Plain(BinaryLinear):
    def terms(self):
        return {}

class Unfinished(BinaryLinear):
    pass
"""


def test_the_command(bimamba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_schemes_of_a_test.py").write_text(OWN)
    answer = bimamba("check-scheme", "own_schemes_of_a_test.Plain")
    assert answer.code == 0 and "conforms" in answer.out and "signs, bias" in answer.out
    answer = bimamba("check-scheme", "own_schemes_of_a_test.Unfinished")
    assert answer.code == 1 and "FAILED" in answer.out and "terms" in answer.out
    for name, sentence in {
        "Plain": "no dotted name",
        "./own_schemes_of_a_test.Plain": "no dotted name",
        "no_such_module.Plain": "No module named",
        "own_schemes_of_a_test.Plane": "no subclass of bimamba_lit.binarize.LatentLinear; did you mean",
        "torch.nn.Linear": "no subclass",
    }.items():
        answer = bimamba("check-scheme", name)
        assert answer.code == 1 and sentence in answer.err, answer
    answer = bimamba("check-scheme", "bimamba_lit.binarize.DoubledInputs")
    assert answer.code == 1 and answer.err.endswith("no subclass of bimamba_lit.binarize.LatentLinear")
