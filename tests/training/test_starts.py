"""Every start with every form of scale: at random, from the teacher's weights, from a post-training result."""

from functools import partial

import pytest
import torch

from bimamba_lit import MambaConfig
from bimamba_lit.binarize import FBI, BinaryLinear, GroupScale, ParetoQ, TwoSided, ptb
from bimamba_lit.models.checkpoint import load_lm
from bimamba_lit.training import Distill

SMALLER = MambaConfig(d_model=16, n_layer=2, headdim=8, d_state=8, chunk_size=8)
SCHEMES = {
    "FBI": FBI,
    "FBI two-sided": partial(FBI, pattern="two_sided"),
    "GroupScale": partial(GroupScale, group_size=16),
    "TwoSided": TwoSided,
    "ParetoQ": ParetoQ,
    "clipped": partial(FBI, pattern="row", straight_through="clipped", reach=1.0),
}
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher(tiny):
    return str(tiny.teacher / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def result(teacher, tmp_path_factory):
    """The teacher, binarized by rows after training."""
    folder = tmp_path_factory.mktemp("result")
    ptb.calibrate_(load_lm(teacher).eval(), ptb.ScaledSign(), [IDS]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("start", ["random", "teacher", "result"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_student_learns_from_every_start(teacher, result, scheme, start):
    torch.manual_seed(0)
    module = Distill(teacher, scheme, {"random": SMALLER, "teacher": "teacher", "result": result}[start])
    module.configure_model()
    module.log_loss = lambda loss: loss
    layers = {name: layer for name, layer in module.lm.named_modules() if isinstance(layer, BinaryLinear)}
    before = load_lm(result) if start == "result" else load_lm(teacher)
    for name, layer in layers.items():
        if start == "teacher":
            assert torch.equal(layer.latent, before.get_submodule(name).weight)
        elif start == "result" and scheme not in (FBI, SCHEMES["FBI two-sided"]):  # whose scales are by input
            torch.testing.assert_close(layer.weight, before.get_submodule(name).weight, rtol=1e-5, atol=0)
    assert len(layers) == (4 if start == "random" else 2)
    loss = module.training_step({"input_ids": IDS, "labels": IDS.roll(-1, 1)})
    loss.backward()
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(dim=-1).float().mean() > 0.9, name
