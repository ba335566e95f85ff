"""The memory that training takes on each device of a recipe, by part, before a device is rented.

One optimizer step runs as Lightning runs it, on tensors without values (:mod:`byte_count`): forward, backward and the
optimizer, with the gradients of the step before still there in the forward pass. The forms of the ops are those of the
recipe's devices, be there such devices here or not. Where weights are sharded, each part is divided as FSDP2 divides
it, and what a device holds gathered at a time is added: the root's weights, and three blocks, one in use, one on its
way, one let go of; in the backward pass the root's gradients and those of one block too.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.binarize import Unfinished
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.callbacks import Progressive
from bimamba_lit.callbacks.steps import latent_layers
from bimamba_lit.errors import UserError
from bimamba_lit.training.byte_count import ByteCount, no_kernels
from bimamba_lit.training.command_line import CommandLine, build
from bimamba_lit.training.distill import Distill
from bimamba_lit.training.language import LanguageModule
from bimamba_lit.training.pretrain import Pretrain
from bimamba_lit.training.run_folder import count_devices

_LATENT, _WEIGHTS, _TEACHER = "latent weights", "other weights", "teacher"
_GRADIENTS, _STATES, _BATCH = "gradients", "optimizer states", "batch"
_FORWARD, _LOSS, _BACKWARD, _STEP = "activations", "loss and its logits", "backward pass", "optimizer step"
_TAUGHT = "teacher's activations"
_STORED = "teacher's distributions"
_GATHERED, _BUCKETS = "gathered weights and gradients", "DDP's buckets of gradients"
_WORKSPACES = "cuBLAS's workspaces"
_ORDER = [
    _LATENT, _WEIGHTS, _GRADIENTS, _STATES, _TEACHER, _BATCH, _STORED, _FORWARD, _TAUGHT, _LOSS, _BACKWARD, _STEP,
    _GATHERED, _BUCKETS, _WORKSPACES,
]  # fmt: skip
_WORKSPACE_BYTES = 64 << 20  # 32 MiB, Hopper's, for each of the threads of the forward and the backward pass
_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16": torch.bfloat16, "16": torch.float16}
_PRECISIONS = ("32-true", "32", *_HALF)
_STRATEGIES = ("auto", "DDPStrategy", "SingleDeviceStrategy", "ModelParallelStrategy")
_LOSSES = ("distillation_loss", "topk_distillation_loss")
_BLOCKS_GATHERED = 3


@dataclass(frozen=True)
class Devices:
    """What a recipe trains on.

    Attributes:
        gpu: Whether they are GPUs.
        count: How many, on all nodes.
        sharded: Whether weights are spread over them.
    """

    gpu: bool
    count: int
    sharded: bool

    def __str__(self) -> str:
        kind = "GPU" if self.gpu else "CPU process"
        if self.count == 1:
            return f"one {kind}"
        return f"each of {self.count} {kind}{'s' if self.gpu else 'es'}, {'FSDP2' if self.sharded else 'DDP'}"


@dataclass(frozen=True)
class Estimate:
    """The bytes of one device when it holds most.

    Attributes:
        parts: Bytes by part; their sum is the highest there is.
        devices: What the recipe trains on.
    """

    parts: dict[str, int]
    devices: Devices

    @property
    def total(self) -> int:
        """The bytes in all."""
        return sum(self.parts.values())


def estimate(args: Sequence[str]) -> Estimate:
    """Return what a training step of a recipe takes, in bytes a device, by part at the moment that it takes most.

    Args:
        args: The command line of ``fit``: ``-c``, a recipe, and settings.

    Raises:
        UserError: If the recipe is not right, trains nothing, or a model or tokenizer that it names cannot be read.
    """
    recipe = cast(_Recipe, build("estimate", "fit", args, _Recipe))
    module, data, trainer = recipe.model, recipe.datamodule, recipe.settings
    if not isinstance(module, Pretrain | Distill):
        raise UserError(
            f"model: estimate is for recipes that train a Pretrain or a Distill, not a {type(module).__name__}"
        )
    _refuse_unknown(trainer)
    return estimate_step(module, data, _devices(trainer), trainer, _unfinished(trainer))


def estimate_step(
    module: LanguageModule, data: Any, devices: Devices, trainer: Any, unfinished: Unfinished | None = None
) -> Estimate:
    """Return what a training step of a module takes.

    Args:
        module: The module, not yet configured.
        data: Its data, of which only the settings and the tokenizer are used.
        devices: What it is to train on.
        trainer: The trainer's settings: ``precision``, ``accumulate_grad_batches`` and ``gradient_clip_val``.
        unfinished: How far its layers have come on their way to binary, which holds more than binary ones.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    precision = str(trainer.precision or "32-true")
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=data, precision=precision, max_steps=1, world_size=1, training=False, optimizers=[]
    )
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    numbers = torch.zeros(data.batch_size, dtype=torch.int64)  # of sequences; their values are read
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if devices.gpu:
            stack.enter_context(ops.as_on_gpu())
            stack.enter_context(no_kernels())
        with _results_without_values():
            module.configure_model()
        for layer in latent_layers(module).values():
            layer.unfinished = unfinished
        count = ByteCount(_weights_of(module, devices))
        stack.enter_context(count)
        optimizer = module.configure_optimizers()["optimizer"]
        module.trainer.optimizers = [optimizer]
        _mark(module, optimizer, count, foreach=devices.gpu and not devices.sharded)
        batch = {
            name: torch.zeros(data.batch_size, data.context, dtype=torch.int64) for name in ("input_ids", "labels")
        }
        count.add(batch.values(), _BATCH)
        _label_calls(module, count, stack)
        if isinstance(module, Distill) and module.stored is not None:
            batch["sequence"] = numbers
            distributions = _no_distributions(module.stored.manifest.top_k, data.context, count)
            stack.enter_context(mock.patch.object(module.stored, "distributions", distributions))
        count.most = {}
        _step(module, batch, optimizer, count, trainer, _HALF.get(precision))
    shown = {name: count.most[name] for name in _ORDER if count.most.get(name)}
    return Estimate(shown | {name: size for name, size in count.most.items() if size and name not in shown}, devices)


def _step(
    module: LanguageModule, batch: dict[str, Tensor], optimizer: Any, count: ByteCount, trainer: Any,
    half: torch.dtype | None,
) -> None:  # fmt: skip
    with count.labelled(_FORWARD), torch.autocast("cpu", dtype=half, enabled=half is not None):
        loss: Any = module.training_step(batch)
    if (trainer.accumulate_grad_batches or 1) == 1:
        optimizer.zero_grad()
    with count.labelled(_BACKWARD):
        loss.backward()
    del loss
    with count.labelled(_STEP):
        if trainer.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(module.parameters(), trainer.gradient_clip_val)
        optimizer.step()


def _mark(module: LanguageModule, optimizer: Any, count: ByteCount, foreach: bool) -> None:
    """Count what is there before a step: weights, gradients and states of the optimizer, and the teacher."""
    for group in optimizer.param_groups:
        group["foreach"] = foreach  # as torch chooses it by the device, and never for sharded weights
    with count.labelled(_GRADIENTS):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: count.add([p.grad], _GRADIENTS))
    with count.labelled(_STATES):
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    count.add(states, _STATES)
    count.add([p.grad for p in module.parameters() if p.grad is not None], _GRADIENTS)
    count.add(module.parameters(), _WEIGHTS)
    count.add((p for name, p in module.named_parameters() if name.endswith(".latent")), _LATENT)
    count.add((tensor for teacher in module._teacher for tensor in teacher.state_dict().values()), _TEACHER)


@contextmanager
def _results_without_values() -> Iterator[None]:
    """Have a student start at a post-training result without what that stands for, which a step's memory is not of."""

    def dense(layer: PTBLinear) -> nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)

    with mock.patch.object(PTBLinear, "dense", dense), mock.patch.object(PTBLinear, "terms", lambda _: None):
        yield


def _label_calls(module: LanguageModule, count: ByteCount, stack: ExitStack) -> None:
    def labelled(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with count.labelled(label):
                return function(*args, **kwargs)

        return call

    stack.enter_context(mock.patch.object(module, "teacher_output", labelled(module.teacher_output, _TAUGHT)))
    for name in _LOSSES:
        if hasattr(ops, name):
            stack.enter_context(mock.patch.object(ops, name, labelled(getattr(ops, name), _LOSS)))


def _no_distributions(top_k: int, context: int, count: ByteCount) -> Callable[[list[int]], tuple[Tensor, Tensor]]:
    """Return what stands in for reading a stored teacher's distributions."""

    def distributions(sequences: list[int]) -> tuple[Tensor, Tensor]:
        with count.labelled(_STORED):
            ids = torch.zeros(len(sequences), context, top_k, dtype=torch.int32)
            return ids, torch.zeros(len(sequences), context, top_k + 1, dtype=torch.float16)

    return distributions


def _weights_of(module: LanguageModule, devices: Devices) -> Callable[[Counter[str], str], dict[str, int]]:
    """Return what makes the bytes of one device of the bytes of a model in one piece."""
    fixed = {_WORKSPACES: _WORKSPACE_BYTES} if devices.gpu else {}
    if devices.count == 1:
        return lambda now, label: dict(now) | fixed
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not devices.sharded:
        fixed |= {_BUCKETS: _bytes(trained)}
        return lambda now, label: dict(now) | fixed
    shards_teacher = bool(getattr(module, "shard_teacher", False))
    divided = {_LATENT, _WEIGHTS, _GRADIENTS, _STATES} | ({_TEACHER} if shards_teacher else set())
    root, block = _units(module.lm)
    gathered = {_FORWARD: root + _BLOCKS_GATHERED * block, _TAUGHT: root, _LOSS: root + block}
    gathered[_BACKWARD] = 2 * root + (_BLOCKS_GATHERED + 1) * block
    if shards_teacher:
        (teacher,) = module._teacher
        teacher_root, teacher_block = _units(teacher)
        gathered[_TAUGHT] += teacher_root + _BLOCKS_GATHERED * teacher_block
        gathered[_LOSS] += _bytes([teacher.head_weight])

    def weigh(now: Counter[str], label: str) -> dict[str, int]:
        parts = {name: -(-size // devices.count) if name in divided else size for name, size in now.items()}
        return parts | fixed | {_GATHERED: gathered.get(label, 0)}

    return weigh


def _units(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model outside of its blocks, and those of its largest block."""
    blocks = [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return _bytes(outside), max((_bytes(block.parameters()) for block in blocks), default=0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Recipe(CommandLine):
    """What a recipe names, made and not run: its devices need not be here."""

    settings: Any

    def before_instantiate_classes(self) -> None:
        """Keep the trainer's settings, and have none of what they name made."""
        sys.argv = self._argv
        trainer = self.config[self.command].trainer
        self.settings = trainer.clone()
        trainer.callbacks = trainer.logger = trainer.plugins = None
        trainer.strategy = "auto"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make no trainer."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _refuse_unknown(trainer: Any) -> None:
    """Raise for what a step is not counted for, or what no training could start with."""
    if trainer.precision is not None and str(trainer.precision) not in _PRECISIONS:
        raise UserError(
            f"trainer.precision: {trainer.precision} is not one that estimate counts: {', '.join(_PRECISIONS)}"
        )
    if not (_strategy(trainer) in _STRATEGIES or _strategy(trainer).startswith("ddp")):
        raise UserError(
            f"trainer.strategy: {_strategy(trainer)} is not one that estimate counts: auto, ddp, ModelParallelStrategy"
        )
    if str(trainer.devices) == "0" or trainer.num_nodes < 1:
        raise UserError(f"trainer: devices is {trainer.devices} and num_nodes {trainer.num_nodes}, the least is 1")


def _unfinished(trainer: Any) -> Unfinished | None:
    """Return how the layers of a recipe begin that makes them binary over its steps."""
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback.class_path.rpartition(".")[2] == Progressive.__name__:
            by = callback.init_args.by
            return Unfinished("mix" if by == "layers" else by, 0.0)
    return None


def _strategy(trainer: Any) -> str:
    strategy = trainer.strategy
    return str(strategy if isinstance(strategy, str) else strategy.class_path).rpartition(".")[2]


def _devices(trainer: Any) -> Devices:
    gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    here = count_devices(trainer.devices) or (max(torch.cuda.device_count(), 1) if gpu else 1)
    name = _strategy(trainer)
    return Devices(gpu, here * trainer.num_nodes, name == "ModelParallelStrategy")


def print_estimate(found: Estimate) -> None:
    """Print the parts as a table."""
    table = Table("part")
    table.add_column("MiB", justify="right")
    for name, size in found.parts.items():
        table.add_row(name, f"{size / 1024**2:,.1f}")
    table.add_section()
    table.add_row("in all", f"{found.total / 1024**2:,.1f}")
    console = Console()
    console.print(f"Memory of {found.devices}:")
    console.print(table)
    console.print(
        "Not counted: the CUDA context and NCCL (about a gigabyte), and what the allocator leaves unused."
        if found.devices.gpu
        else "Not counted: Python and its libraries (about half a gigabyte a process)."
    )
