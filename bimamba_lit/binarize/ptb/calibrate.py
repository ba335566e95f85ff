"""Post-training binarization of a whole model, block by block.

The model's own forward pass leads from block to block: it is run with stand-ins that return what the blocks before
have made, up to the next block, whose arguments it hands over. So a residual stream reaches that block as in the real
model, whether it runs through the blocks or beside them, and nothing has to be known of the model. (The released
GPTQ-for-Mamba passes on the first output of a block alone, and so drops the residual stream that runs beside it.)

Inside a block the layers are taken in the order in which the block multiplies by them, with one pass over the
calibration text each, which ends at the layer: ``in_proj`` first, then ``out_proj`` on the inputs that the fitted
``in_proj`` makes. A last pass makes the inputs of the next block.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bimamba_lit.binarize.ptb.inputs import InputHessian
from bimamba_lit.binarize.ptb.layer import PTBLinear
from bimamba_lit.binarize.ptb.progress import CalibrationProgress
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.targets import TARGETS, dense_layers
from bimamba_lit.errors import UserError, nearest

Model = TypeVar("Model", bound=nn.Module)
Batch = Tensor | Mapping[str, Any]


def calibrate_(
    model: Model,
    scheme: PTBScheme,
    batches: Iterable[Batch] = (),
    blocks: str = "layers",
    targets: Sequence[str] = TARGETS,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Model:
    """Fit every targeted ``nn.Linear`` in the blocks of ``model`` by a post-training scheme, in place.

    Each layer is fitted to the inputs that the layers fitted before it give, in fp32, without autocast, in evaluation
    mode. In memory are the calibration text's activations between two blocks, what one block needs for one batch, and
    one layer's Hessian. The result depends on nothing but model, scheme and batches.

    Args:
        model: Any module that runs a list of blocks one after the other, of this project or another.
        scheme: The scheme.
        batches: Calibration text: token ids ``(B, L)``, or mappings of the model's arguments; ``labels`` and what the
            model does not take are left out. A scheme that needs no Hessian needs none.
        blocks: The ``nn.ModuleList`` of the blocks, as an fnmatch pattern on its dotted name or on its last part.
        targets: Layers to fit, as in :func:`bimamba_lit.binarize.binarize_`; those outside the blocks are left alone.
        device: Where blocks run and layers are fitted, one block at a time; by default where the model is.
        progress: Show how far the calibration is, with the time left.

    Returns:
        ``model``, with a :class:`PTBLinear` in the place of every fitted layer.

    Raises:
        UserError: If the scheme is none, there are no such blocks or layers, no batches, or a layer cannot be fitted:
            its weight or inputs are not finite, its inputs are all zero, it is never multiplied by. The model is then
            as it was.
    """
    if not isinstance(scheme, PTBScheme):
        raise UserError(f"calibrate_ takes a post-training scheme, as ptb.GPTQ(), not {scheme!r}")
    found = _blocks(model, blocks)
    layers = _targeted(model, found, targets)
    kept = list(batches) if scheme.needs_hessian else []
    if scheme.needs_hessian and not kept:
        raise UserError(f"there is no calibration text: {type(scheme).__name__} needs at least one batch of tokens")
    home = next(model.parameters()).device
    text = _Text(model, list(found.values()), kept, home, torch.device(device or home))
    steps = sum(len(kept) * (len(inside) + 1) + len(inside) for inside in layers.values()) - len(kept)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _no_autocast(home, text.device), CalibrationProgress(steps, progress) as bar:
            for number, (name, block) in enumerate(found.items(), 1):
                bar.block(f"{name} ({number} of {len(found)})")
                calls = text.calls(block)
                block.to(text.device)
                _fit_block(model, scheme, text, block, calls, layers[name], bar)
                if number < len(found):
                    text.advance(block, calls, bar)
                block.to(home)
    except BaseException:
        for name, linear in _flat(layers).items():
            model.set_submodule(name, linear)
        raise
    finally:
        for block in found.values():
            block.to(home)
        for module, training in modes.items():
            module.training = training
        for name, linear in _flat(layers).items():
            model.get_submodule(name).training = modes[linear]
    return model


class _Call(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Text:
    """The calibration text on its way through the blocks: what the last of them made of every batch."""

    def __init__(
        self, model: nn.Module, blocks: list[nn.Module], batches: list[Batch], home: torch.device, device: torch.device
    ) -> None:
        self.device = device
        self._home = home
        self._model = model
        self._blocks = blocks
        self._batches = [_arguments(model, batch, home) for batch in batches]
        self._outputs: list[Any] = [None] * len(batches)
        self._told = False

    def calls(self, block: nn.Module) -> list[_Call]:
        """Return what the model calls ``block`` with, for every batch."""
        return [self._call(block, index) for index in range(len(self._batches))]

    def run(self, block: nn.Module, call: _Call) -> Any:
        """Run a block, which has to be on the device; return its output."""
        return block(*_moved(call.args, self.device), **_moved(call.kwargs, self.device))

    def advance(self, block: nn.Module, calls: list[_Call], bar: CalibrationProgress) -> None:
        """Run every batch through ``block``; a batch's output takes the place of its input before the next is run."""
        for index in range(len(calls)):
            self._outputs[index] = _moved(self.run(block, calls[index]), self._home)
            calls[index] = _Call((), {})
            bar.step()

    def checked(self, inputs: InputHessian) -> Tensor:
        """Return the Hessian of a layer's inputs; warn, once, if there is too little text for its rank."""
        hessian = inputs.mean()
        if not hessian.any():
            raise UserError("its input is zero for all of the calibration text, so there is nothing to fit it to")
        if inputs.tokens < len(hessian) and not self._told:
            self._told = True
            warnings.warn(
                f"{inputs.name}: {inputs.tokens} calibration tokens are too few for the Hessian of {len(hessian)} "
                "inputs, whose rank they limit: it is damped and the fit goes on; more text gives a better one",
                stacklevel=4,
            )
        return hessian

    def _call(self, block: nn.Module, index: int) -> _Call:
        """Run the model up to ``block`` with stand-ins for the blocks before; return what it calls it with."""
        expected = iter(self._blocks)

        def stand_in(one: nn.Module, call: _Call) -> Any:
            if one is not next(expected, None):
                raise UserError(_ORDER)
            if one is block:
                raise _Arrived(call)
            return self._outputs[index]

        try:
            with _in_place_of(self._blocks, stand_in):
                self._model(*self._batches[index].args, **self._batches[index].kwargs)
        except _Arrived as arrived:
            return arrived.call
        raise UserError(_ORDER)


_ORDER = "the model does not run its blocks one after the other, so it cannot be calibrated block by block"


class _Arrived(Exception):
    def __init__(self, call: _Call) -> None:
        self.call = call


@contextmanager
def _in_place_of(blocks: list[nn.Module], stand_in: Callable[[nn.Module, _Call], Any]) -> Iterator[None]:
    """Have ``stand_in`` called in the place of every block, hooks and all, while the context lasts."""
    names = ("forward", "_forward_hooks", "_forward_pre_hooks")
    kept = [{name: vars(block)[name] for name in names if name in vars(block)} for block in blocks]
    try:
        for block in blocks:
            forward = partial(_forward, block, stand_in)
            vars(block).update(forward=forward, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        yield
    finally:
        for block, own in zip(blocks, kept, strict=True):
            vars(block).pop("forward", None)
            vars(block).update(own)


def _forward(block: nn.Module, stand_in: Callable[[nn.Module, _Call], Any], *args: Any, **kwargs: Any) -> Any:
    return stand_in(block, _Call(args, kwargs))


def _fit_block(
    model: nn.Module,
    scheme: PTBScheme,
    text: _Text,
    block: nn.Module,
    calls: list[_Call],
    layers: Mapping[str, nn.Linear],
    bar: CalibrationProgress,
) -> None:
    """Fit the layers of one block, each to the inputs that those before it give."""
    rest = dict(layers)
    while rest:
        hessian = InputHessian(rest)
        for call in calls:
            hessian.watch(partial(text.run, block, call))
            bar.step()
        name = hessian.name if calls else next(iter(rest))
        if name is None:
            raise UserError(
                f"{next(iter(rest))} is never multiplied by while its block runs, so its inputs cannot be seen: leave "
                "it out of targets, or turn off the fused kernel that takes its weight (mamba_ssm's use_mem_eff_path)"
            )
        linear = rest.pop(name)
        try:
            result = scheme.fit(linear.weight, text.checked(hessian) if calls else None)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        model.set_submodule(name, PTBLinear(linear, scheme, result.parts))
        bar.step()
    block.eval()  # the dense weights that were formed are let go


def _blocks(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the blocks by their dotted names."""
    lists = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    matching = [name for name in outer if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)]
    if len(matching) != 1:
        told = (
            f"is the name of several lists ({', '.join(matching)})" if matching else "is no list of blocks in the model"
        )
        hint = "" if matching else nearest(pattern, [*outer, *(name.rpartition(".")[2] for name in outer)])
        raise UserError(f"blocks: '{pattern}' {told}{hint or '; its lists are ' + (', '.join(outer) or 'none')}")
    return {f"{matching[0]}.{name}": block for name, block in lists[matching[0]].named_children()}


def _targeted(
    model: nn.Module, blocks: Mapping[str, nn.Module], targets: Sequence[str]
) -> dict[str, dict[str, nn.Linear]]:
    """Return the layers to fit, by block and by dotted name."""
    chosen = dense_layers(model, targets)
    inside = {
        block: {name: layer for name, layer in chosen.items() if name.startswith(f"{block}.")} for block in blocks
    }
    if not any(inside.values()):
        names = [targets] if isinstance(targets, str) else targets
        raise UserError(f"targets: {', '.join(names)} match no layer inside the blocks, {next(iter(blocks))} and so on")
    return inside


def _arguments(model: nn.Module, batch: Batch, home: torch.device) -> _Call:
    """Return what the model is called with for a batch."""
    taken = inspect.signature(model.forward).parameters
    # In transformers' models a cache would remember the text from one pass to the next.
    more = {"use_cache": False} if "use_cache" in taken else {}
    if isinstance(batch, Tensor):
        return _Call((batch.to(home),), more)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given = {name: value for name, value in batch.items() if (name in taken or open_ended) and name != "labels"}
    return _Call((), _moved(given, home) | more)


def _flat(layers: Mapping[str, Mapping[str, nn.Linear]]) -> dict[str, nn.Linear]:
    return {name: linear for inside in layers.values() for name, linear in inside.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


@contextmanager
def _no_autocast(*devices: torch.device) -> Iterator[None]:
    with torch.autocast(devices[0].type, enabled=False), torch.autocast(devices[-1].type, enabled=False):
        yield
