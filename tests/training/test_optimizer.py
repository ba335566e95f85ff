import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_
from bimamba_lit.errors import UserError
from bimamba_lit.training import AdamW
from bimamba_lit.training.language import LanguageModule
from bimamba_lit.training.model_line import ModelLine

SETTINGS = AdamW(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=24, weight_decay=0.3)


@pytest.fixture
def lm():
    return binarize_(MambaLM(MambaConfig(vocab_size=11, d_model=16, n_layer=2, headdim=8, d_state=8)), FBI)


def groups_of(settings: AdamW, module: nn.Module) -> dict[str, dict]:
    optimizer = settings.build(module, 10)["optimizer"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups) == len(optimizer.param_groups)
    return groups


def test_what_is_decayed_and_what_is_not(lm):
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    groups = groups_of(SETTINGS, lm)
    assert list(groups) == ["matrices", "vectors", "latent", "scales"]
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.0, 0.3, 0.0]
    assert {group["initial_lr"] for group in groups.values()} == {1.0}
    found = {key: {names[id(one)].split("layers.")[-1] for one in group["params"]} for key, group in groups.items()}
    projections = [f"{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj", "out_proj")]
    assert found["latent"] == {f"{name}.latent" for name in projections}
    assert found["scales"] == {f"{name}.{part}" for name in projections for part in ("in_scale", "in_shift")}
    assert found["matrices"] == {"backbone.embedding.weight", "0.mixer.conv1d.weight", "1.mixer.conv1d.weight"}
    for ending in ("A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight", "conv1d.bias"):
        assert any(name.endswith(ending) for name in found["vectors"]), (ending, found["vectors"])
    assert sum(map(len, found.values())) == len(list(lm.parameters()))


def test_latent_weights_and_scales_have_settings_of_their_own(lm):
    settings = AdamW(lr=1.0, min_lr=0.5, warmup_steps=1, latent_lr=4.0, scale_lr=0.0, decay_latent=False)
    built = settings.build(lm, 5)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert [groups[name]["weight_decay"] for name in ("matrices", "latent", "scales")] == [0.1, 0.0, 0.0]
    layer = lm.backbone.layers[0].mixer.in_proj
    before = layer.in_scale.detach().clone()
    rates = []
    for step in range(5):
        rates.append({name: group["lr"] for name, group in groups.items()})
        assert settings.rates(optimizer) == {
            "lr": rates[step]["matrices"],
            "lr/latent": rates[step]["latent"],
            "lr/scales": 0.0,
        }
        optimizer.zero_grad()
        lm(torch.arange(10)[None]).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        schedule.step()
    assert [rate["matrices"] for rate in rates[:2]] == [0.5, 1.0] and rates[4]["matrices"] == pytest.approx(0.5)
    assert all(rate["latent"] == 4 * rate["vectors"] for rate in rates)
    assert torch.equal(layer.in_scale, before)


def test_the_bias_of_a_binary_layer_is_no_scale():
    model = binarize_(nn.Sequential(nn.Linear(4, 3)), FBI, ["0"])
    groups = groups_of(AdamW(scale_lr=1.0), model)
    assert [len(groups[name]["params"]) for name in ("vectors", "latent", "scales")] == [1, 1, 2]
    assert groups["vectors"]["params"][0] is model[0].bias


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    groups = groups_of(SETTINGS, layer)
    assert list(groups) == ["vectors"] and len(groups["vectors"]["params"]) == 1


def rates_of(settings: AdamW, steps: int) -> list[float]:
    built = settings.build(nn.Linear(2, 2), 20)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("min_lr", [0.1, 0.0])
def test_the_rate_rises_in_a_line_and_ends_at_its_lowest_at_the_last_step(schedule, min_lr):
    rates = rates_of(AdamW(lr=1.0, min_lr=min_lr, warmup_steps=4, total_steps=25, schedule=schedule), 30)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx((1.0 + min_lr) / 2)
    share = 0.5 * (1 + math.cos(math.pi / 4)) if schedule == "cosine" else 0.75
    assert rates[9] == pytest.approx(min_lr + (1 - min_lr) * share)
    assert rates[23] > min_lr
    assert rates[24:] == pytest.approx([min_lr] * 6, abs=1e-15)


def test_without_its_own_length_the_schedule_is_as_long_as_the_run():
    rates = rates_of(AdamW(lr=1.0, min_lr=0.0, warmup_steps=0), 20)
    assert rates[0] == 1.0 and rates[18] > 0 and rates[19] == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(UserError, match="the schedule has no length"):
        AdamW().build(nn.Linear(2, 2), -1)


WRONG = [
    {"lr": 0.0},
    {"lr": -1.0},
    {"min_lr": 1.0},
    {"min_lr": -1.0},
    {"warmup_steps": -1},
    {"latent_lr": -1.0},
    {"scale_lr": -1.0},
    {"schedule": "step"},
    {"weight_decay": -0.1},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
]


@pytest.mark.parametrize("wrong", WRONG)
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


@pytest.mark.parametrize("steps", [3, 4, 5, -1])
def test_a_run_that_ends_within_its_warm_up_says_so(capsys, steps):
    trainer = SimpleNamespace(is_global_zero=True, optimizers=[object()], max_steps=steps)
    ModelLine().on_train_start(trainer, LanguageModule(SETTINGS))
    assert ("ends within its warm-up" in capsys.readouterr().out) == (steps in (3, 4))
