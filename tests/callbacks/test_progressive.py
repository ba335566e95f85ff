"""Progressive binarization and the annealed gradient: what layers compute at which step, resumed or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from bimamba_lit.binarize import FBI, BinaryLinear, Ternary, Unfinished
from bimamba_lit.callbacks import AnnealedGradient, BitFlips, Progressive
from bimamba_lit.errors import UserError

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def soft(linear: nn.Linear) -> FBI:
    return FBI(linear, straight_through="clipped", reach=2.0)


def layers(module: Any) -> list[BinaryLinear]:
    return [layer for layer in module.lm.modules() if isinstance(layer, BinaryLinear)]


class Seen(pl.Callback):
    """Keeps what the layers were like when a step was taken, and while validating after how many steps."""

    def __init__(self, name: str = "unfinished") -> None:
        self.name = name
        self.stepping: dict[int, list[Any]] = {}
        self.validating: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.stepping[trainer.global_step] = [getattr(layer, self.name) for layer in layers(pl_module)]

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validating[trainer.global_step] = [getattr(layer, self.name) for layer in layers(pl_module)]


@pytest.mark.parametrize("by", ["mix", "rows", "tanh"])
def test_layers_become_binary_between_two_steps(tiny: SimpleNamespace, tmp_path: Path, by: Any) -> None:
    seen, module = Seen(), tiny.module()
    callbacks = [Progressive(by, end_step=6, start_step=2), BitFlips(3), seen]
    trainer = tiny.trainer(tmp_path, callbacks, max_steps=8, limit_val_batches=1, val_check_interval=3)
    trainer.fit(module, tiny.data())
    expected = {step: Unfinished(by, max(0.0, (step - 2) / 4)) for step in range(6)} | {6: None, 7: None}
    assert seen.stepping == {step: [state] * 2 for step, state in expected.items()}
    assert seen.validating == {step: [expected[step]] * 2 for step in (0, 3, 6)}
    assert [layer.unfinished for layer in layers(module)] == [None, None]


def test_layer_after_layer_becomes_binary(tiny: SimpleNamespace, tmp_path: Path) -> None:
    seen, latent = Seen(), Unfinished("mix", 0.0)
    tiny.trainer(tmp_path, [Progressive("layers", end_step=4), seen], max_steps=5).fit(tiny.module(), tiny.data())
    one_of_two = [None, latent]
    assert list(seen.stepping.values()) == [[latent] * 2, [latent] * 2, one_of_two, one_of_two, [None] * 2]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("callback", [Progressive("mix", end_step=7), AnnealedGradient(end_step=7)])
def test_a_resumed_run_is_one_never_stopped(
    tiny: SimpleNamespace, tmp_path: Path, accumulate: int, callback: pl.Callback
) -> None:
    class SaveAt4(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4 and not (tmp_path / "at4.ckpt").exists():  # before gradients add up again
                trainer.save_checkpoint(tmp_path / "at4.ckpt")

    def run(*more: pl.Callback, ckpt: Path | None = None) -> Any:
        module = tiny.module(soft)
        trainer = tiny.trainer(tmp_path, [callback, *more], max_steps=8, accumulate_grad_batches=accumulate)
        trainer.fit(module, tiny.data(), ckpt_path=ckpt, weights_only=True)
        return module.lm.state_dict()

    whole = run(SaveAt4())
    resumed = run(ckpt=tmp_path / "at4.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_gradient_narrows_by_the_same_ratio_every_step(tiny: SimpleNamespace, tmp_path: Path) -> None:
    seen, module = Seen("widening"), tiny.module(soft)
    callbacks = [AnnealedGradient(end_step=5, start_step=1, softest=16.0), seen]
    tiny.trainer(tmp_path, callbacks, max_steps=7).fit(module, tiny.data())
    assert [pair[0] for pair in seen.stepping.values()] == [16, 16, 8, 4, 2, 1, 1]
    layer = layers(module)[0]
    unit = layer.latent.detach().abs().mean(1, keepdim=True)
    for widening in (4.0, 1.0):
        layer.widening, layer.latent.grad = widening, None
        layer.weight.sum().backward()
        inside = layer.latent.detach().abs() <= widening * 2 * unit
        assert torch.equal(layer.latent.grad != 0, inside) and inside.float().mean() > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Progressive("mix", end_step=2.0, start_step=2), "start_step is 2 and end_step 2, and must be"),
        (lambda: AnnealedGradient(end_step=2, start_step=-1), "start_step is -1"),
        (lambda: AnnealedGradient(end_step=2, softest=1.0), "softest is 1.0, and must be above 1"),
        (lambda: Progressive("mix", end_step=2.5), "end_step is 2.5; it must be a whole step, or a share"),
        (lambda: Progressive("mix", end_step=float("inf")), "end_step is inf; it must be a whole step, or a share"),
        (lambda: Progressive("mix", end_step=0.25, start_step=2), "start_step is 2 and end_step 2, and must be"),
        (lambda: AnnealedGradient(end_step=8), "it has identity and the reach null"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(tiny: SimpleNamespace, tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.trainer(tmp_path, [make()], max_steps=8).fit(tiny.module(), tiny.data())


def test_the_end_can_be_a_share_of_the_run(tiny: SimpleNamespace, tmp_path: Path) -> None:
    seen = Seen()
    tiny.trainer(tmp_path, [Progressive("mix", end_step=0.75), seen], max_steps=4).fit(tiny.module(), tiny.data())
    expected = [Unfinished("mix", share / 3) for share in range(3)] + [None]
    assert list(seen.stepping.values()) == [[state] * 2 for state in expected]
    with pytest.raises(UserError, match="0.75, a share of trainer.max_steps: set that too"):
        tiny.trainer(tmp_path, [Progressive("mix", end_step=0.75)], max_steps=-1, max_epochs=1).fit(
            tiny.module(), tiny.data()
        )


def test_a_run_too_short_for_its_schedule_is_told(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny.module()
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, [Progressive("mix", end_step=4.0)], max_steps=2).fit(module, tiny.data())
    assert "Progressive: end_step is 4, after this run's last step, 2: the schedule does not reach" in caplog.text
    assert layers(module)[0].unfinished == Unfinished("mix", 0.5)


@pytest.mark.parametrize("scheme", [None, Ternary])
def test_layers_that_are_not_one_sign_a_weight_are_left_alone_and_that_is_told(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: Any
) -> None:
    module = tiny.module(scheme)
    trainer = tiny.trainer(tmp_path, [Progressive("rows", end_step=2), AnnealedGradient(end_step=2)], max_steps=2)
    with caplog.at_level("INFO"):
        trainer.fit(module, tiny.data())
    assert trainer.global_step == 2 and not layers(module)
    for name in ("Progressive", "AnnealedGradient"):
        assert f"{name}: the model has no layer of one sign a weight, so it changes nothing" in caplog.text
