"""The conformance check of a binarization scheme, for schemes written outside this project as well as its own.

A scheme that passes trains, resumes, packs, is stored in the bits that it reports and comes back from files as it was.
What it is asked for is what :class:`bimamba_lit.binarize.LatentLinear` promises, checked on layers and on a small
model. Which export formats can hold it is told, not demanded.
"""

import copy
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.binarize import (
    DEPLOYED_BITS,
    BinaryLinear,
    LatentLinear,
    binarize_,
    pack_,
    packed_form,
    quantized_layers,
)
from bimamba_lit.errors import UserError, nearest
from bimamba_lit.export import FORMATS, export
from bimamba_lit.training.optimizer import AdamW

INPUTS, OUTPUTS = 256, 96
TOLERANCE = 1e-5  # of a packed layer against the trained one, relative, in fp32
_CONFIG = MambaConfig(d_model=128, n_layer=2, vocab_size=64, headdim=32, d_state=16)
_STEPS = 3  # before and after the resume

Scheme = type[LatentLinear]


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        question: What was checked.
        answer: What was found.
        passed: Whether that is right; None where it is only told.
    """

    question: str
    answer: str
    passed: bool | None


class _Wrong(Exception):
    """What a scheme does not do."""


def check_scheme(name: str) -> bool:
    """Check a scheme and print what was found.

    Args:
        name: The class by its dotted name, of a module on PYTHONPATH or in the working folder.

    Returns:
        Whether it passed.

    Raises:
        UserError: If there is no such class, or it is no subclass of ``LatentLinear``.
    """
    console = Console()
    findings = findings_of(find_scheme(name))
    for finding in findings:
        mark = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "told  "}[finding.passed]
        console.print(f"{mark}  {finding.question}: {finding.answer}", highlight=False, soft_wrap=True)
    failed = sum(finding.passed is False for finding in findings)
    console.print(f"\n{name}: " + (f"{failed} of its checks failed" if failed else "conforms"), highlight=False)
    return not failed


def find_scheme(name: str) -> Scheme:
    """Import a scheme by its dotted name.

    Raises:
        UserError: If there is no such class, or it is no subclass of ``LatentLinear``.
    """
    module, _, last = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"'{name}' is no dotted name of a class: give one such as my_module.MyScheme")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(imported := importlib.import_module(module), last, None)
    except ImportError as error:
        raise UserError(f"{error}; give a module on PYTHONPATH or in this folder") from error
    finally:
        sys.path.pop(0)
    if not _is_scheme(found):
        schemes = [key for key, value in vars(imported).items() if _is_scheme(value)]
        raise UserError(f"{name} is no subclass of bimamba_lit.binarize.LatentLinear{nearest(last, schemes)}")
    return found


def _is_scheme(found: object) -> TypeGuard[Scheme]:
    return isinstance(found, type) and issubclass(found, LatentLinear)


def findings_of(scheme: Scheme) -> list[Finding]:
    """Ask a scheme every question; one that fails keeps none of the others from being asked.

    Of a weight that is not finite nothing else is asked: what is not a number equals nothing, itself neither.
    """
    if broken := _not_finite(scheme):
        return [Finding("its weight is finite", broken, False)]
    questions: dict[str, Callable[[Scheme], str]] = {
        "takes over weights and bias of an nn.Linear": _takes_over,
        "its weight is that of its packed form": _weight,
        "gradients reach the latent weights and every scale": _gradients,
        "options are plain values that build it again": _options,
        "packed, it computes what it was trained to": _packs,
        "the bits it reports are the bytes of its file": _storage,
        "a saved model comes back as it was": _round_trip,
        "a resumed run ends as one never stopped": _resumes,
    }
    findings = []
    for question, ask in questions.items():
        torch.manual_seed(0)
        try:
            findings.append(Finding(question, ask(scheme), True))
        except (_Wrong, UserError) as error:
            findings.append(Finding(question, str(error), False))
        except Exception as error:  # noqa: BLE001  (code of others may raise anything)
            findings.append(Finding(question, f"{type(error).__name__}: {error}", False))
    return findings + _exports(scheme)


def _layer(scheme: Scheme, bias: bool = True) -> LatentLinear:
    return scheme(nn.Linear(INPUTS, OUTPUTS, bias=bias))


def _model(scheme: Scheme) -> MambaLM:
    torch.manual_seed(1)
    return binarize_(MambaLM(_CONFIG), scheme)


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Wrong(otherwise)


def _distance(found: Tensor, right: Tensor) -> float:
    return float(((found - right).abs().max() / right.abs().max()).detach())


def _not_finite(scheme: Scheme) -> str | None:
    """Say how many values of a layer's weight are not finite, or nothing where none is or there is no weight."""
    torch.manual_seed(0)
    try:
        weight = _layer(scheme).weight
        bad = int((~torch.isfinite(weight)).sum())
    except Exception:  # noqa: BLE001  (told by the questions)
        return None
    return f"of {weight.numel()} values, {bad} are NaN or infinite" if bad else None


def _takes_over(scheme: Scheme) -> str:
    for bias in (True, False):
        linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
        layer = scheme(linear)
        _demand(layer.latent.shape == (OUTPUTS, INPUTS), f"latent has shape {tuple(layer.latent.shape)}")
        _demand(layer.latent.dtype == torch.float32, f"latent is {layer.latent.dtype}, not float32")
        _demand((layer.bias is not None) == bias, "the bias is lost or made up")
        x = torch.randn(3, INPUTS)
        right = layer.finish(nn.functional.linear(x, layer.weight, layer.bias))
        _demand(_distance(layer(x), right) <= TOLERANCE, "forward is not a product with its weight")
    return f"({OUTPUTS}, {INPUTS}), with a bias and without"


def _weight(scheme: Scheme) -> str:
    layer = _layer(scheme)
    error = _distance(packed_form(layer).weight, layer.weight)
    _demand(error <= TOLERANCE, f"it differs from what its terms and signs, or its codes, give by {error:.1e}")
    return f"{', '.join(layer.storage())}; within {error:.1e}"


def _gradients(scheme: Scheme) -> str:
    layer = _layer(scheme).train()
    (layer(torch.randn(64, INPUTS)) * torch.randn(64, OUTPUTS)).sum().backward()
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        _demand(grad is not None, f"{name} gets none")
        assert grad is not None
        _demand(bool(torch.isfinite(grad).all()), f"that of {name} is not finite")
        _demand(bool(grad.any()), f"that of {name} is zero")
    answer = f"{len(list(layer.parameters()))} parameters"
    if not isinstance(layer, BinaryLinear):
        return answer  # a scale that codes are rounded by has a gradient that stands in, too
    worst = max((_slope_error(layer, name) for name, _ in layer.named_parameters() if name != "latent"), default=0.0)
    _demand(worst <= 0.01, f"that of a scale is {worst:.1%} off its finite difference")
    return f"{answer}; scales within {worst:.1e} of finite differences"


def _slope_error(layer: BinaryLinear, name: str) -> float:
    """Compare a parameter's gradient along a direction with the change of the output along it, in fp64."""
    layer = copy.deepcopy(layer).double()
    layer.train()
    layer.scaled_gradients = False  # which would make the gradient another on purpose
    parameter = layer.get_parameter(name)
    x, direction = torch.randn(64, INPUTS).double(), torch.randn(64, OUTPUTS).double()
    way = torch.randn_like(parameter)

    def result() -> Tensor:
        return (layer(x) * direction).sum()

    (grad,) = torch.autograd.grad(result(), [parameter])
    step = 1e-5
    with torch.no_grad():
        parameter.add_(step * way)
        above = result()
        parameter.sub_(2 * step * way)
        below = result()
    slope = (above - below) / (2 * step)
    return float(((grad * way).sum() - slope).abs() / slope.abs().clamp(min=1e-12))


def _options(scheme: Scheme) -> str:
    linear = nn.Linear(INPUTS, OUTPUTS)
    layer = scheme(linear)
    options = layer.options()
    for key, value in options.items():
        plain = isinstance(value, bool | int | float | str | list | tuple | type(None))
        _demand(plain, f"{key} is a {type(value).__name__}")
    again = scheme(linear, **options)
    _demand(again.options() == options, f"built from {options} it has {again.options()}")
    _demand(torch.equal(again.weight, layer.weight), "built again it has another weight")
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "none"


@torch.no_grad()
def _packs(scheme: Scheme) -> str:
    layer = _layer(scheme).eval()
    nn.init.normal_(layer.latent)  # not the weights that scales were initialised from
    packed, x = packed_form(layer), torch.randn(5, INPUTS)
    error = _distance(packed(x), layer(x))
    _demand(error <= TOLERANCE, f"outputs differ by {error:.1e}")
    return f"outputs within {error:.1e}"


def _storage(scheme: Scheme) -> str:
    layer = _layer(scheme)
    packed = packed_form(layer)
    told = layer.storage()
    _demand(told == packed.storage(), f"packed it reports {packed.storage()}, before {told}")
    half = {16: torch.float16}[DEPLOYED_BITS]
    tensors = {name: t if t.dtype == torch.uint8 else t.to(half) for name, t in packed.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        content = path.read_bytes()
    written = 8 * (len(content) - 8 - int.from_bytes(content[:8], "little"))
    _demand(written == sum(told.values()), f"it reports {sum(told.values())} bits and its file holds {written}")
    return f"{sum(told.values()) / layer.latent.numel():.3f} bits a weight of a {OUTPUTS} x {INPUTS} layer"


@torch.no_grad()
def _round_trip(scheme: Scheme) -> str:
    lm = _model(scheme).eval()
    ids = torch.randint(_CONFIG.known_vocab_size, (2, 20))
    with tempfile.TemporaryDirectory() as folder:
        for form in ("latent", "packed"):
            lm.save_pretrained(Path(folder) / form)
            again = MambaLM.from_pretrained(Path(folder) / form).eval()
            _demand(torch.equal(again(ids).logits, lm(ids).logits), f"the {form} model computes something else")
            for (name, one), (_, other) in zip(quantized_layers(lm), quantized_layers(again), strict=True):
                _demand(one.kind() == other.kind(), f"{name} comes back as {other.kind()}")
            if form == "latent":
                pack_(lm)
    return "latent and packed, logits equal to the bit"


def _resumes(scheme: Scheme) -> str:
    def build() -> tuple[MambaLM, torch.optim.Optimizer]:
        lm = _model(scheme).train()
        optimizer = AdamW(lr=1e-2, min_lr=1e-3, warmup_steps=1).build(lm, 2 * _STEPS)["optimizer"]
        return lm, optimizer

    texts = torch.randint(_CONFIG.known_vocab_size, (2 * _STEPS, 2, 17))

    def train(lm: MambaLM, optimizer: torch.optim.Optimizer, batches: Tensor) -> None:
        for ids in batches:
            optimizer.zero_grad()
            hidden = lm.backbone(ids[:, :-1])
            ops.distillation_loss(hidden, lm.head_weight, labels=ids[:, 1:], hard_share=1.0).backward()
            optimizer.step()

    straight = build()
    train(*straight, texts)
    stopped = build()
    train(*stopped, texts[:_STEPS])
    file = io.BytesIO()
    torch.save([stopped[0].state_dict(), stopped[1].state_dict()], file)
    file.seek(0)
    resumed = build()
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed[0].load_state_dict(model_state)
    resumed[1].load_state_dict(optimizer_state)
    train(*resumed, texts[_STEPS:])
    states = [lm.state_dict() for lm, _ in (straight, resumed)]
    differing = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    _demand(not differing, f"{', '.join(differing[:3])} differ")
    return f"{len(states[0])} tensors equal to the bit"


def _exports(scheme: Scheme) -> list[Finding]:
    findings = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        try:
            _model(scheme).save_pretrained(saved)
        except Exception:  # noqa: BLE001  (told by the round trip)
            return []
        for format in FORMATS:
            try:
                export(saved, format, Path(folder) / format, {})
                answer = "holds it"
            except UserError as error:
                answer = f"cannot hold it: {error}"
            except Exception as error:  # noqa: BLE001
                answer = f"fails: {type(error).__name__}: {error}"
            findings.append(Finding(f"export to {format}", answer, None))
    return findings
