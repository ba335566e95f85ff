import math

import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_
from bimamba_lit.errors import UserError
from bimamba_lit.training import AdamW

SETTINGS = AdamW(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=24, weight_decay=0.3)


def test_only_matrices_are_decayed():
    lm = binarize_(MambaLM(MambaConfig(vocab_size=11, d_model=16, n_layer=2, headdim=8, d_state=8)), FBI)
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    decayed, kept = SETTINGS.build(lm, 10)["optimizer"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    groups = [{names[id(parameter)].split("layers.")[-1] for parameter in group["params"]} for group in (decayed, kept)]
    assert groups[0] == {"backbone.embedding.weight"} | {
        f"{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj.latent", "out_proj.latent", "conv1d.weight")
    }
    for ending in ("A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight", "conv1d.bias", "in_proj.in_scale"):
        assert any(name.endswith(ending) for name in groups[1]), (ending, groups[1])
    assert sum(map(len, groups)) == len(list(lm.parameters()))


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    decayed, kept = SETTINGS.build(layer, 10)["optimizer"].param_groups
    assert (len(decayed["params"]), len(kept["params"])) == (0, 1)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    built = SETTINGS.build(nn.Linear(2, 2), 999)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx((1.0 + 0.1) / 2)
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[24:] == pytest.approx([0.1] * 6)


def test_without_its_own_length_the_schedule_is_as_long_as_the_run():
    settings = AdamW(lr=1.0, min_lr=0.0, warmup_steps=0)
    optimizer, schedule = (built := settings.build(nn.Linear(2, 2), 3))["optimizer"], built["lr_scheduler"]["scheduler"]
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(UserError, match="the schedule has no length"):
        settings.build(nn.Linear(2, 2), -1)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": -1.0}, {"min_lr": 1.0}, {"min_lr": -1.0}, {"warmup_steps": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AdamW(**wrong)


def test_a_step_moves_the_latent_weights():
    lm = binarize_(MambaLM(MambaConfig(vocab_size=11, d_model=16, n_layer=1, headdim=8, d_state=8)), FBI)
    before = lm.backbone.layers[0].mixer.in_proj.latent.detach().clone()
    optimizer = SETTINGS.build(lm, 10)["optimizer"]
    lm(torch.arange(10)[None]).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    assert not torch.equal(before, lm.backbone.layers[0].mixer.in_proj.latent)
