"""Cases of the packed linear, beside cuBLAS on dense weights and gemlite, and of the binary layer in training.

Legend: T tokens, O/I out/in features.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit import ops
from bimamba_lit.bench.gpu import shapes
from bimamba_lit.bench.gpu.case import Call, Case, Chosen, Inputs, Work
from bimamba_lit.bench.gpu.ops import OURS
from bimamba_lit.bench.gpu.peers import installed
from bimamba_lit.bench.gpu.shapes import randn
from bimamba_lit.binarize import FBI

SQUARES = (2048, 4096, 8192)
FEW_ALONE = ("2048^2", "4096^2")  # not measured with many tokens
FEW, MANY = (1, 16), (64, 256, 2048, 4096, 16384)
GROUP = 128  # gemlite's


def linear_cases(chosen: Chosen) -> Iterator[Case]:
    """Yield the chosen cases."""
    sizes = [(f"{size}^2", size, size) for size in SQUARES]
    sizes += [
        (f"{model.name} {name}", *shape)
        for model in shapes.MODELS
        for name, shape in zip(("in_proj", "out_proj"), model.projections, strict=True)
    ]
    for name, in_features, out_features in sizes:
        for tokens in FEW if chosen("gemv") else ():
            yield _packed("gemv", name, tokens, in_features, out_features)
        for tokens in MANY if chosen("gemm") and name not in FEW_ALONE else ():
            yield _packed("gemm", name, tokens, in_features, out_features)
    for model in shapes.MODELS if chosen("binary_layer") else ():
        for name, shape in zip(("in_proj", "out_proj"), model.projections, strict=True):
            yield _training(f"{model.name} {name}", *shape)


def _packed(op: str, name: str, tokens: int, in_features: int, out_features: int) -> Case:
    """Return a case of FBI's form: signs and a scale of every input; the peers hold the same weight their way."""

    def inputs() -> Inputs:
        signs = torch.randint(256, (out_features, in_features // 8), dtype=torch.uint8, device=shapes.DEVICE)
        scale = torch.rand(in_features, device=shapes.DEVICE) + 0.5
        dense = (ops.unpack_signs(signs, in_features) * scale).bfloat16()
        return {"x": randn(tokens, in_features), "signs": signs, "scale": scale.bfloat16(), "dense": dense}

    def ours(given: Inputs, **options: Any) -> Tensor:
        with torch.no_grad():
            return ops.binary_linear(given["x"], given["signs"], in_features, in_scale=given["scale"], **options)

    def right(given: Inputs) -> Tensor:
        return F.linear(given["x"].float(), ops.unpack_signs(given["signs"], in_features) * given["scale"].float())

    calls: dict[str, Call] = {
        OURS: ours,
        f"{OURS}, 8-bit activations": partial(ours, activation_bits=8),
        "cuBLAS bf16": lambda given: F.linear(given["x"], given["dense"]),
    }
    if (gemlite := installed("gemlite")) is not None:
        calls["gemlite"] = _gemlite(gemlite, in_features, out_features)
    return Case(
        op,
        f"{tokens} tokens" if tokens > 1 else "1 token",
        f"{name}: {in_features} x {out_features}",
        inputs,
        calls,
        Work(
            in_features * out_features / 8 + 2 * tokens * (in_features + out_features),
            2 * tokens * in_features * out_features,
        ),
        right,
    )


def _gemlite(gemlite: Any, in_features: int, out_features: int) -> Call:
    """Return a call of its 1-bit layer; it has no scale of an input, so that is multiplied into x outside."""
    layers: dict[int, Any] = {}

    def layer_of(given: Inputs) -> Any:
        signs = given["signs"]
        if signs.data_ptr() not in layers:
            bf16 = gemlite.DType.BF16
            layer = gemlite.GemLiteLinear(
                1,
                group_size=GROUP,
                in_features=in_features,
                out_features=out_features,
                input_dtype=bf16,
                output_dtype=bf16,
            )
            constant = torch.ones(out_features, in_features // GROUP, dtype=torch.bfloat16, device=shapes.DEVICE)
            bits = (ops.unpack_signs(signs, in_features) > 0).to(torch.uint8)
            layer.pack(bits, 2 * constant, 0.5 * constant, None)
            layers[signs.data_ptr()] = layer, given["x"] * given["scale"]
        return layers[signs.data_ptr()]

    def run(given: Inputs) -> Any:
        layer, x = layer_of(given)
        return layer(x)

    return run


def _training(name: str, in_features: int, out_features: int) -> Case:
    """Return a case of a layer whose signs and scales are formed anew, with every gradient, and of a dense one."""

    def inputs() -> Inputs:
        layer = FBI(nn.Linear(in_features, out_features, bias=False, device=shapes.DEVICE))
        return {
            "layer": layer,
            "dense": layer.weight.detach().bfloat16().requires_grad_(),
            "x": randn(shapes.TOKENS, in_features, grad=True),
            "direction": randn(shapes.TOKENS, out_features),
        }

    def binary(given: Inputs) -> list[Tensor]:
        with torch.autocast(shapes.DEVICE, torch.bfloat16):
            y = given["layer"](given["x"])
        return [y, *torch.autograd.grad(y, [given["x"], *given["layer"].parameters()], given["direction"])][:2]

    def dense(given: Inputs) -> list[Tensor]:
        y = F.linear(given["x"], given["dense"])
        return [y, *torch.autograd.grad(y, [given["x"], given["dense"]], given["direction"])][:2]

    def right(given: Inputs) -> list[Tensor]:
        x = given["x"].detach().float().requires_grad_()
        y = F.linear(x, given["layer"].weight.detach())
        return [y, *torch.autograd.grad(y, x, given["direction"].float())]

    return Case(
        "binary_layer",
        "forward + backward",
        f"{name}: {in_features} x {out_features}, {shapes.TOKENS} tokens",
        inputs,
        {OURS: binary, "cuBLAS bf16": dense},
        Work(0, 6 * shapes.TOKENS * in_features * out_features),
        right,
        rotate=False,
    )
