import math

import pytest
import torch

from bimamba_lit.eval import BitsPerByte, LanguageMetrics, metrics


def batch(seed: int, counted: float = 0.7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 19, (3, 11), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) > counted] = -100
    sizes = torch.where(labels == -100, 0, torch.randint(1, 5, labels.shape, generator=draw))
    return torch.randn(3, 11, 8, generator=draw), labels, sizes


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(19, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("chunk", [1, 7, 2048])
def test_figures_match_plain_float64(head, monkeypatch, chunk):
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", chunk)
    teacher_head = head + 0.5 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))
    figures = LanguageMetrics(with_teacher=True)
    nats = tokens = size = same = 0.0
    for seed in range(3):
        hidden, labels, sizes = batch(seed)
        figures.update(hidden, head, labels, sizes, (hidden, teacher_head))
        for row, column in (labels != -100).nonzero().tolist():
            logits = [float(weights.double() @ hidden[row, column].double()) for weights in head]
            theirs = [float(weights.double() @ hidden[row, column].double()) for weights in teacher_head]
            total = math.log(sum(math.exp(logit) for logit in logits))
            nats += total - logits[labels[row, column]]
            same += logits.index(max(logits)) == theirs.index(max(theirs))
            size += int(sizes[row, column])
            tokens += 1
    found = {name: float(value) for name, value in figures.compute().items()}
    assert 0 < same < tokens
    expected = {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "agreement": same / tokens}
    assert found == pytest.approx(expected | {"bits_per_byte": nats / math.log(2) / size}, rel=1e-5)


def test_nothing_counted_changes_nothing(head):
    hidden, labels, sizes = batch(0)
    one, two = LanguageMetrics(), LanguageMetrics()
    for figures in (one, two):
        figures.update(hidden, head, labels, sizes)
    two.update(hidden, head, torch.full_like(labels, -100), torch.zeros_like(sizes))
    assert one.compute() == two.compute()


def test_figures_start_anew_after_each_evaluation(head):
    figures = LanguageMetrics()
    hidden, labels, sizes = batch(0)
    figures.update(hidden, head, labels, sizes)
    first = figures.compute()
    figures.update(*batch(1)[:1], head, *batch(1)[1:])
    figures.compute()
    figures.update(hidden, head, labels, sizes)
    assert figures.compute() == first


def test_bits_per_byte_is_summed_before_it_is_divided():
    metric = BitsPerByte()
    metric.update(torch.tensor(2 * math.log(2)), torch.tensor(1))
    metric.update(torch.tensor(2 * math.log(2)), torch.tensor(7))
    assert float(metric.compute()) == pytest.approx(0.5)


def test_mixed_precision_does_not_blur_the_figures(head):
    hidden, labels, label_bytes = batch(0)
    figures = []
    for half in (False, True):
        measured = LanguageMetrics()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            measured.update(hidden, head, labels, label_bytes)
        figures.append(measured.compute()["bits_per_byte"])
    assert figures[0] == figures[1]
