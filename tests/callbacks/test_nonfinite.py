from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from bimamba_lit.callbacks import NonFiniteGuard
from bimamba_lit.errors import UserError

# torchdata's loader calls torch.set_vital; Lightning's pytree helpers check LeafSpec and the loader's workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class At(pl.Callback):
    """Does something at the start of a given batch, then keeps the weights."""

    def __init__(self, batch_idx: int, act: Callable[[Any], None] = lambda module: None) -> None:
        self.batch_idx, self.act = batch_idx, act
        self.before: dict[str, Tensor] = {}
        self.moments: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            self.act(pl_module)
            self.before = weights(pl_module.lm)


def stop(tiny: SimpleNamespace, tmp_path: Path, module: Any, at: At, **options: Any) -> str:
    trainer = tiny.trainer(tmp_path, [at, NonFiniteGuard()], max_steps=8, **options)
    with pytest.raises(UserError) as error:
        trainer.fit(module, tiny.data())
    after = weights(module.lm)
    assert at.before
    for name, before in at.before.items():
        torch.testing.assert_close(after[name], before, rtol=0, atol=0, equal_nan=True)
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter(tiny: SimpleNamespace, tmp_path: Path, value: float) -> None:
    name = "backbone.layers.0.mixer.in_proj.in_scale"

    def spoil(module: Any) -> None:
        with torch.no_grad():
            module.lm.get_parameter(name)[3] = value

    told = stop(tiny, tmp_path, tiny.module(), At(4, spoil))
    assert "before optimizer step 5" in told
    assert "the loss of batch 4 of epoch 0 is nan" in told
    assert told.endswith(f"not finite before this step: lm.{name}")


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        ("backbone.layers.0.norm", "lm.backbone.layers.0.norm"),
        ("backbone.layers.0.mixer.out_proj", "lm.backbone.layers.0.mixer.out_proj"),
    ],
)
def test_an_activation(tiny: SimpleNamespace, tmp_path: Path, inner: str, named: str) -> None:
    def spoil(module: Any) -> None:
        module.lm.get_submodule(inner).register_forward_hook(lambda m, x, y: tree_map(lambda t: t * float("nan"), y))

    told = stop(tiny, tmp_path, tiny.module(), At(2, spoil))
    assert "the loss of batch 2 of epoch 0 is nan" in told
    assert told.endswith(f"the first module whose output is not finite is {named}")


def test_an_input(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """A module that is no language model, fed with floats."""

    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lm = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.lm(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    inputs = torch.ones(6, 2, 3)
    inputs[3, 1, 2] = float("nan")
    module, at = Regression(), At(3)
    trainer = tiny.trainer(tmp_path, [at, NonFiniteGuard()], max_steps=6)
    with pytest.raises(UserError, match=r"step 4, .* batch 3 .* the first module whose output is not finite is lm\.0$"):
        trainer.fit(module, torch.utils.data.DataLoader(inputs, batch_size=None))
    torch.testing.assert_close(weights(module.lm), at.before, rtol=0, atol=0)


def test_a_training_step_without_an_index(tiny: SimpleNamespace, tmp_path: Path) -> None:
    class BatchAlone(tiny.module):  # type: ignore[misc]
        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return super().training_step(batch, 0)

    def spoil(module: Any) -> None:
        module.lm.backbone.norm_f.register_forward_hook(lambda m, x, y: y * float("nan"))

    told = stop(tiny, tmp_path, BatchAlone(), At(1, spoil))
    assert told.endswith("the first module whose output is not finite is lm.backbone.norm_f")


def test_a_loss_whose_modules_are_all_finite(tiny: SimpleNamespace, tmp_path: Path) -> None:
    class NothingCounted(tiny.module):  # type: ignore[misc]
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            labels = torch.full_like(batch["labels"], -100) if batch_idx == 1 else batch["labels"]
            return cross_entropy(self.lm(batch["input_ids"]).logits.flatten(0, 1), labels.flatten())

    told = stop(tiny, tmp_path, NothingCounted(), At(1))
    assert "the loss of batch 1 of epoch 0 is nan" in told
    assert told.endswith("look at the loss, the batch's labels and a teacher, if any")


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}])
def test_a_gradient(tiny: SimpleNamespace, tmp_path: Path, options: dict[str, Any]) -> None:
    names = ["backbone.layers.0.mixer.out_proj.latent", "backbone.layers.0.mixer.dt_bias", "backbone.embedding.weight"]

    def spoil(module: Any) -> None:
        for name in names:
            module.lm.get_parameter(name).register_hook(lambda g: torch.full_like(g, float("inf")))

    told = stop(tiny, tmp_path, tiny.module(), At(3, spoil), **options)
    assert "before optimizer step 4, the weights unchanged: the norm of the gradients is inf after batch 3 of" in told
    listed = told.split(" in ")[-1].split(", ")
    assert set(listed) == {f"lm.{name}" for name in names}
    assert listed[-1] == "lm.backbone.embedding.weight"


def test_a_norm_that_overflows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def spoil(module: Any) -> None:
        module.lm.backbone.norm_f.weight.register_hook(lambda g: torch.full_like(g, 1e30))

    told = stop(tiny, tmp_path, tiny.module(), At(0, spoil))
    assert told.endswith("their norm overflows; the largest is that of lm.backbone.norm_f.weight")


def test_the_batch_is_named_with_gradient_accumulation(tiny: SimpleNamespace, tmp_path: Path) -> None:
    class OneBadBatch(tiny.module):  # type: ignore[misc]
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 7 else 1.0)

    # Step 2 takes batches 4 to 7.
    told = stop(tiny, tmp_path, OneBadBatch(), At(4), accumulate_grad_batches=4)
    assert "before optimizer step 2" in told
    assert "the loss of batch 7 of epoch 0 is nan" in told


class Overflowing(pl.LightningModule):
    """A loss whose gradient overflows in batch 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = nn.Linear(2, 1)
        self.lm.weight.register_hook(lambda g: g * float("inf") if self.spoilt else g)
        self.spoilt = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.spoilt = batch_idx == 1
        return self.lm(batch).float().mean() * (float("nan") if batch_idx == 3 else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_under_a_gradient_scaler_gradients_are_its_business_and_losses_are_not(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    module = Overflowing()
    trainer = tiny.trainer(tmp_path, [NonFiniteGuard()], max_steps=6, plugins=[plugin])
    with pytest.raises(UserError, match=r"step 4, .* the loss of batch 3 of epoch 0 is nan"):
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(6, 1, 2), batch_size=None))
    assert scaler.get_scale() == 2.0  # halved once, by the step it skipped
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_sound_run_is_left_alone(tiny: SimpleNamespace, tmp_path: Path) -> None:
    finals = []
    for callbacks in ([], [NonFiniteGuard()]):
        module = tiny.module()
        tiny.trainer(tmp_path, callbacks, max_steps=5, gradient_clip_val=1.0).fit(module, tiny.data())
        finals.append(weights(module))
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)


class BadBatches(pl.Callback):
    """Makes the loss of some batches, or the gradients after them, not finite."""

    def __init__(self, losses: tuple[int, ...] = (), gradients: tuple[int, ...] = ()) -> None:
        self.losses, self.gradients, self.batch_idx = losses, gradients, -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        norm = pl_module.lm.backbone.norm_f
        norm.register_forward_hook(lambda m, x, y: y * float("nan") if self.batch_idx in self.losses else y)
        norm.weight.register_hook(lambda g: g * float("inf") if self.batch_idx in self.gradients else g)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_idx = batch_idx


class Without(pl.Callback):
    """Ends the backward pass of some batches without gradients: the definition of a step left out."""

    def __init__(self, *batches: int) -> None:
        self.batches, self.batch_idx = batches, -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.batch_idx in self.batches:
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}])
def test_steps_left_out_change_nothing_and_are_counted(
    tiny: SimpleNamespace, tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    finals = []
    guard = NonFiniteGuard(skip=2)
    for callbacks in ([BadBatches((2, 3), (6,)), guard], [Without(2, 3, 6)]):
        module = tiny.module()
        trainer = tiny.trainer(tmp_path, callbacks, max_steps=8, **options)
        with caplog.at_level("INFO"):
            trainer.fit(module, tiny.data())
        assert trainer.global_step == 8
        finals.append((weights(module), trainer.optimizers[0].state_dict()))
        if callbacks[-1] is guard:
            assert float(trainer.callback_metrics["guard/skipped_steps"]) == 3
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)
    assert guard.skipped == 3 and guard.state_dict() == {"skipped": 3, "in_a_row": 0}
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "step 3 is left out, 1 so far: the loss of batch 2 of epoch 0 is nan; run again, the first module" in told[0]
    assert "step 7 is left out, 3 so far: the norm of the gradients is inf after batch 6 of epoch 0; the" in told[2]


def test_one_more_in_a_row_stops(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [BadBatches((3, 4, 5)), NonFiniteGuard(skip=2)], max_steps=8)
    with pytest.raises(UserError, match=r"before optimizer step 6 after 2 were left out in a row, .* batch 5 of epoch"):
        trainer.fit(tiny.module(), tiny.data())
    with pytest.raises(UserError, match="skip is -1"):
        NonFiniteGuard(skip=-1)


def test_the_sequences_are_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    class Numbered(tiny.data):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            rows = [{**row, "sequence": torch.tensor(100 + i)} for i, row in enumerate(loader.dataset)]
            return type(loader)(rows, batch_size=2)

    options: dict[str, Any] = {"max_steps": 8, "accumulate_grad_batches": 4}
    trainer = tiny.trainer(tmp_path, [BadBatches(losses=(5,)), NonFiniteGuard()], **options)
    with pytest.raises(UserError, match=r"batch 5 of epoch 0 \(sequences 110, 111 of the training text\) is nan"):
        trainer.fit(tiny.module(), Numbered())
    trainer = tiny.trainer(tmp_path, [BadBatches(gradients=(7,)), NonFiniteGuard()], **options)
    with pytest.raises(
        UserError, match=r"after batches 4 to 7 of epoch 0 \(sequences 108, 109, 110 and 5 more of the training text\)"
    ):
        trainer.fit(tiny.module(), Numbered())
