import math

import pytest
import torch
from torch.nn.functional import softplus

from bimamba_lit import MambaConfig, MambaLM


@pytest.fixture(scope="module")
def lm():
    """A model with a thousand heads in all, initialised and untouched."""
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=256, n_layer=4, vocab_size=512, headdim=2, d_state=8))


def distance_from_uniform(values, low, high):
    """Return Kolmogorov-Smirnov's statistic times sqrt(n); below 1.63 for 99 in 100 uniform samples."""
    values = values.detach().flatten().double().sort().values
    share = (values - low) / (high - low)
    assert share[0] >= -1e-6 and share[-1] <= 1 + 1e-6, "outside the range"
    steps = torch.arange(1, values.numel() + 1) / values.numel()
    return float((share - steps).abs().max()) * math.sqrt(values.numel())


def gathered(lm, name):
    return torch.cat([layer.mixer.get_parameter(name).detach().flatten() for layer in lm.backbone.layers])


def test_a_is_uniform_from_1_to_16(lm):
    assert distance_from_uniform(gathered(lm, "A_log").exp(), 1, 16) < 1.63


def test_dt_is_log_uniform_from_a_thousandth_to_a_tenth(lm):
    dt = softplus(gathered(lm, "dt_bias").double())
    assert distance_from_uniform(dt.log(), math.log(1e-3), math.log(1e-1)) < 1.63


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.weight", 256**-0.5),
        ("out_proj.weight", 512**-0.5 / 4**0.5),  # kaiming_uniform(a=sqrt(5)) / sqrt(n_layer)
        ("conv1d.weight", 4**-0.5),
        ("conv1d.bias", 4**-0.5),
    ],
)
def test_projections_and_convolution_are_uniform(lm, name, bound):
    assert distance_from_uniform(gathered(lm, name), -bound, bound) < 1.63


def test_skips_and_norms_are_one(lm):
    ones = [
        parameter for name, parameter in lm.named_parameters() if name.endswith((".D", "norm.weight", "norm_f.weight"))
    ]
    assert len(ones) == 3 * 4 + 1
    assert all(bool((parameter == 1).all()) for parameter in ones)


def test_the_embedding_is_normal(lm):
    table = lm.backbone.embedding.weight.detach()
    assert table.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(table.mean().item()) < 0.02 * 4 / math.sqrt(table.numel())
    assert (table.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, rel=0.1)  # two deviations of a normal


def test_what_mamba_excludes_from_weight_decay_is_marked(lm):
    marked = {name for name, parameter in lm.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {
        f"backbone.layers.{layer}.mixer.{name}" for layer in range(4) for name in ("A_log", "D", "dt_bias")
    }


def test_parameter_names_and_shapes_are_those_of_mamba_ssm():
    lm = MambaLM(MambaConfig(d_model=32, n_layer=1, vocab_size=61, d_state=8, headdim=16, ngroups=2, d_conv=3))
    mixer = "backbone.layers.0.mixer."
    assert {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()} == {
        "backbone.embedding.weight": (64, 32),
        "backbone.layers.0.norm.weight": (32,),
        mixer + "dt_bias": (4,),
        mixer + "A_log": (4,),
        mixer + "D": (4,),
        mixer + "in_proj.weight": (64 + 64 + 2 * 8 + 2 * 8 + 4, 32),
        mixer + "conv1d.weight": (64 + 32, 1, 3),
        mixer + "conv1d.bias": (64 + 32,),
        mixer + "norm.weight": (64,),
        mixer + "out_proj.weight": (32, 64),
        "backbone.norm_f.weight": (32,),
        "lm_head.weight": (64, 32),
    }
