import pytest
import torch

from bimamba_lit.binarize import FBI, BinaryLinear, PackedLinear, binarize_
from bimamba_lit.models.deployed import deployed_
from bimamba_lit.models.generate import generate


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_a_deployed_model_is_packed_in_half_precision_and_says_the_same(make, mixer):
    lm = binarize_(make(mixer=mixer), FBI).eval()
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = lm(ids).logits
    assert deployed_(lm) is lm
    logits = lm(ids).logits
    assert logits.dtype == torch.bfloat16 and float((logits - expected).norm() / expected.norm()) < 0.03
    layers = [type(layer) for layer in lm.modules() if isinstance(layer, BinaryLinear | PackedLinear)]
    assert layers and set(layers) == {PackedLinear}
    wide = {name.rpartition(".")[2] for name, value in lm.named_parameters() if value.dtype == torch.float32}
    assert {"A_log", "D"} <= wide <= {"A_log", "D", "dt_bias", "bias"}
    assert generate(lm, ids, 3, temperature=0).shape == (1, 12)


def test_a_model_without_binary_layers_is_only_rounded(make):
    lm = deployed_(make())
    assert lm.backbone.embedding.weight.dtype == torch.bfloat16
