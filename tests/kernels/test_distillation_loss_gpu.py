"""The fused distillation loss on a GPU: full vocabularies, lengths off every block, memory, CUDA graphs, equal runs."""

import pytest
import torch

from bimamba_lit import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the driver's words differ from machine to machine
]
VOCABULARY = 50277


def make(tokens, dtype, vocabulary=VOCABULARY):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    labels = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    labels[1::5] = -100
    return {
        "hidden_s": normal(tokens, 192).requires_grad_(),
        "head_s": normal(vocabulary, 192, scale=0.1).requires_grad_(),
        "hidden_t": normal(tokens, 256),
        "head_t": normal(vocabulary, 256, scale=0.1),
        "labels": labels,
    }


def loss_and_gradients(inputs, backend, **options):
    loss = ops.distillation_loss(**inputs, backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss, (inputs["hidden_s"], inputs["head_s"]))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.005), (torch.float16, 0.005)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 63, 100, 257, 2000])
@pytest.mark.parametrize("divergence", ops.DIVERGENCES)
def test_loss_and_gradients(divergence, tokens, dtype, bound):
    inputs = make(tokens, dtype)
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    options = {"divergence": divergence, "temperature": 2.0, "hard_share": 0.3}
    found = loss_and_gradients(inputs, "triton", **options)
    for a, b in zip(found, loss_and_gradients(exact, "naive", **options), strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(inputs, "triton", **options), found, strict=True))


def test_a_tenth_of_the_memory_of_full_logits():
    inputs = make(16384, torch.bfloat16) | {"labels": None}
    peaks = {}
    for backend in ("naive", "triton"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(inputs, backend)
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    assert peaks["triton"] <= 0.1 * peaks["naive"], peaks


def test_captured_in_a_cuda_graph():
    inputs = make(300, torch.bfloat16, vocabulary=1000)
    right = loss_and_gradients(inputs, "triton", hard_share=0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradients(inputs, "triton", hard_share=0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = loss_and_gradients(inputs, "triton", hard_share=0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
