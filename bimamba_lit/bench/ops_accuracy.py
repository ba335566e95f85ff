"""How far the fast form of every op is from its definition in float64."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bimamba_lit import ops

Run = Callable[..., "Tensor | tuple[Tensor, ...]"]
Normal = Callable[..., Tensor]

_LENGTH, _HEADS, _WIDTH, _SIZE, _CHANNELS = 300, 4, 32, 16, 48
_IN, _OUT, _VOCABULARY = 96, 40, 500


class Case(NamedTuple):
    """An op and what it is called with.

    Attributes:
        name: What the rows of it are called.
        run: The op.
        inputs: By name, what receives gradients.
        options: The other arguments.
    """

    name: str
    run: Run
    inputs: dict[str, Tensor]
    options: dict[str, object]


def ops_accuracy(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, float]]:
    """Measure every op's fast form, ``backend="auto"``, against its definition in float64, forward and gradients.

    Left out are :func:`ops.pack_signs`, whose result is bits, and :func:`ops.packed_blocks`, which runs the others.
    The inputs are random from a fixed seed, 300 tokens long, with two documents where an op knows of documents. They
    are rounded to `dtype` before either form sees them.

    Args:
        device: Where the fast form runs; the definition runs on the CPU.
        dtype: Of the fast form's inputs.

    Returns:
        Rows (``"op: output"`` or ``"op: gradient of input"``, max |found - right| / max |right|).
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = []
    for name, run, inputs, options in [*_scans(normal), *_steps(normal), *_layers(normal), *_losses(normal)]:
        right = _outputs_and_gradients(run, inputs, options, "naive", "cpu", torch.float64)
        found = _outputs_and_gradients(run, inputs, options, "auto", device, dtype)
        rows += [(f"{name}: {quantity}", _relative_error(found[quantity], right[quantity])) for quantity in right]
        # Ops may take another path where no gradients are recorded, as binary_linear does.
        with torch.no_grad():
            found = _outputs(run, inputs, options, "auto", device, dtype)
        rows += [
            (f"{name}: {quantity} without gradients", _relative_error(found[quantity], right[quantity]))
            for quantity in found
        ]
    signs = ops.pack_signs(normal(_OUT, _IN))
    unpacked = ops.unpack_signs(signs.to(device), _IN).double().cpu()
    rows.append(("unpack_signs: output 1", _relative_error(unpacked, ops.unpack_signs(signs, _IN, backend="naive"))))
    return rows


def _scans(normal: Normal) -> Iterator[Case]:
    documents = (torch.arange(_LENGTH) >= 100).int()[None]
    scanned = {
        "x": normal(1, _LENGTH, _HEADS, _WIDTH),
        "dt": normal(1, _LENGTH, _HEADS) - 2,
        "B": normal(1, _LENGTH, 1, _SIZE),
        "C": normal(1, _LENGTH, 1, _SIZE),
        "z": normal(1, _LENGTH, _HEADS, _WIDTH),
        "initial_states": normal(1, _HEADS, _WIDTH, _SIZE),
    }
    options: dict[str, object] = {"dt_softplus": True, "seq_idx": documents, "return_final_states": True}
    yield Case("ssd", ops.ssd, scanned | _of_heads(normal), options)
    inner, channels = _HEADS * _WIDTH, _HEADS * _WIDTH + 2 * _SIZE
    mixed = {
        "projected": normal(1, _LENGTH, inner + channels + _HEADS),
        "conv_weight": normal(channels, 4) / 2,
        "conv_bias": normal(channels),
        "norm_weight": normal(inner),
    }
    yield Case("conv_ssd_norm", ops.conv_ssd_norm, mixed | _of_heads(normal), {"seq_idx": documents})
    filtered = {"x": normal(1, _CHANNELS, _LENGTH), "initial_states": normal(1, _CHANNELS, 3)}
    options = {"activation": "silu", "seq_idx": documents, "return_final_states": True}
    yield Case("causal_conv1d", ops.causal_conv1d, filtered | _filter(normal), options)
    selected = {
        "u": normal(1, _CHANNELS, _LENGTH),
        "delta": normal(1, _CHANNELS, _LENGTH) - 2,
        "B": normal(1, _SIZE, _LENGTH),
        "C": normal(1, _SIZE, _LENGTH),
        "z": normal(1, _CHANNELS, _LENGTH),
        "initial_states": normal(1, _CHANNELS, _SIZE),
    }
    options = {"delta_softplus": True, "seq_idx": documents, "return_last_state": True}
    yield Case("selective_scan", ops.selective_scan, selected | _of_channels(normal), options)


def _steps(normal: Normal) -> Iterator[Case]:
    maps = {"B": normal(2, 1, _SIZE), "C": normal(2, 1, _SIZE), "z": normal(2, _HEADS, _WIDTH)}
    advanced = {
        "state": normal(2, _HEADS, _WIDTH, _SIZE),
        "x": normal(2, _HEADS, _WIDTH),
        "dt": normal(2, _HEADS) - 2,
    }
    yield Case("ssd_step", ops.ssd_step, advanced | maps | _of_heads(normal), {"dt_softplus": True})
    filtered = {"x": normal(2, _CHANNELS), "conv_state": normal(2, _CHANNELS, 3)}
    yield Case("causal_conv1d_step", ops.causal_conv1d_step, filtered | _filter(normal), {"activation": "silu"})
    selected = {
        "state": normal(2, _CHANNELS, _SIZE),
        "u": normal(2, _CHANNELS),
        "delta": normal(2, _CHANNELS) - 2,
        "B": normal(2, _SIZE),
        "C": normal(2, _SIZE),
        "z": normal(2, _CHANNELS),
    }
    options: dict[str, object] = {"delta_softplus": True}
    yield Case("selective_scan_step", ops.selective_scan_step, selected | _of_channels(normal), options)


def _layers(normal: Normal) -> Iterator[Case]:
    features = normal(_LENGTH, 64)
    yield Case("rms_norm", ops.rms_norm, {"x": features, "weight": normal(64), "z": normal(_LENGTH, 64)}, {})
    yield Case("norm_and_residual", ops.norm_and_residual, {"x": features, "weight": normal(64)}, {})
    terms = {
        "in_scale": normal(_IN),
        "out_scale": normal(_OUT),
        "group_scale": normal(_OUT, 3),
        "in_shift": normal(_IN),
        "out_shift": normal(_OUT),
    }
    latent = normal(_OUT, _IN)
    packed: dict[str, object] = {"signs": ops.pack_signs(latent), "in_features": _IN}
    yield Case("binary_linear", ops.binary_linear, {"x": normal(_LENGTH, _IN), **terms, "bias": normal(_OUT)}, packed)
    for name in ops.STRAIGHT_THROUGH:
        options: dict[str, object] = {"straight_through": name, "reach": normal(_OUT).abs() + 0.5}
        yield Case(f"binary_weight {name}", ops.binary_weight, {"latent": latent, **terms}, options)
    trained = {"x": normal(_LENGTH, _IN), "latent": latent, **terms, "bias": normal(_OUT)}
    yield Case("latent_linear", ops.latent_linear, trained, {})


def _losses(normal: Normal) -> Iterator[Case]:
    labels = normal(_LENGTH, _VOCABULARY).float().argmax(-1)
    student = {"hidden_s": normal(_LENGTH, 24), "head_s": normal(_VOCABULARY, 24)}
    teacher: dict[str, object] = {"hidden_t": normal(_LENGTH, 32), "head_t": normal(_VOCABULARY, 32)}
    likeliest = normal(_LENGTH, _VOCABULARY).float().topk(5).indices
    stored: dict[str, object] = {"top_ids": likeliest, "top_log_probs": normal(_LENGTH, 6)}
    for divergence in ops.DIVERGENCES:
        options: dict[str, object] = {"labels": labels, "divergence": divergence, "temperature": 2.0, "hard_share": 0.3}
        options["chunk_tokens"] = 128
        yield Case(f"distillation_loss {divergence}", ops.distillation_loss, student, teacher | options)
        yield Case(f"topk_distillation_loss {divergence}", ops.topk_distillation_loss, student, stored | options)


def _of_heads(normal: Normal) -> dict[str, Tensor]:
    return {"A": -15 * normal(_HEADS).sigmoid() - 1, "D": normal(_HEADS), "dt_bias": normal(_HEADS)}


def _of_channels(normal: Normal) -> dict[str, Tensor]:
    rates = -15 * normal(_CHANNELS, _SIZE).sigmoid() - 1
    return {"A": rates, "D": normal(_CHANNELS), "delta_bias": normal(_CHANNELS)}


def _filter(normal: Normal) -> dict[str, Tensor]:
    return {"weight": normal(_CHANNELS, 4), "bias": normal(_CHANNELS)}


def _outputs(
    run: Run, leaves: dict[str, Tensor], options: dict[str, object], backend: str, device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    fixed = {name: _moved(value, device, dtype) for name, value in options.items()}
    moved = {name: t.to(device, dtype) for name, t in leaves.items()}
    outputs = run(**moved, **fixed, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"output {number}": t for number, t in enumerate(outputs, start=1)}


def _outputs_and_gradients(
    run: Run, inputs: dict[str, Tensor], options: dict[str, object], backend: str, device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = {name: t.detach().to(device, dtype).requires_grad_() for name, t in inputs.items()}
    outputs = _outputs(run, leaves, options, backend, device, dtype)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), directions)
    found = {quantity: t.detach() for quantity, t in outputs.items()}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _moved(value: object, device: torch.device | str, dtype: torch.dtype) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double().cpu() - right).abs().max() / right.abs().max())
