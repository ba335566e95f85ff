"""Decoding under a CUDA graph: the tokens of plain steps, and memory that does not grow."""

import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_, pack_
from bimamba_lit.models import generate as module
from bimamba_lit.models.cuda_graph import StepGraph
from bimamba_lit.models.generate import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def make(mixer="mamba2", keep=(), double=None):
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=128, n_layer=3, vocab_size=211, headdim=32, d_state=32, mixer=mixer)).cuda()
    return pack_(binarize_(lm, FBI, keep_rows={"in_proj": keep}, double_inputs=double or {})).eval()


@pytest.mark.parametrize(
    ("mixer", "keep", "double"),
    [
        ("mamba2", (), {}),
        ("mamba", (), {}),
        ("mamba2", ("B", "C", "dt"), {}),
        ("mamba2", ("dt",), {"in_proj": 0.2, "out_proj": 0.2}),
    ],
)
def test_a_graph_steps_as_the_model_does(mixer, keep, double):
    lm = make(mixer, keep, double)
    ids = torch.randint(211, (2, 9), device="cuda")
    graph = StepGraph(lm, 2)
    _, state = lm.prefill(ids, lm.init_state(2))
    graph.read(state)
    for token in torch.randint(211, (5, 2), device="cuda"):
        expected, state = lm.step(token, state)
        torch.testing.assert_close(graph.step(token), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_the_tokens_are_those_of_plain_steps(mixer, temperature, monkeypatch):
    lm, ids = make(mixer), torch.randint(211, (2, 9), device="cuda")

    def tokens():
        return generate(lm, ids, 40, temperature, torch.Generator("cuda").manual_seed(0))

    recorded = []
    monkeypatch.setattr(module, "StepGraph", lambda *args: recorded.append(StepGraph(*args)) or recorded[-1])
    with_graph = tokens()
    assert len(recorded) == 1
    monkeypatch.setattr(module, "_WORTH_A_GRAPH", 1000)
    assert torch.equal(with_graph, tokens()) and len(recorded) == 1


def test_memory_does_not_grow_with_the_text():
    lm, ids = make(), torch.randint(211, (2, 9), device="cuda")

    def peak(count):
        torch.cuda.reset_peak_memory_stats()
        generate(lm, ids, count, 0)
        return torch.cuda.max_memory_allocated()

    peak(20), peak(20)  # kernels are compiled, libraries set up
    assert abs(peak(800) - peak(20)) <= 2 * 800 * 8 + 4096  # the tokens themselves
