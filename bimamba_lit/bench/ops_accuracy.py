"""How far the fast form of every op is from its definition in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from bimamba_lit import ops

Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


def ops_accuracy(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, float]]:
    """Measure every op's fast form, ``backend="auto"``, against its definition in float64, forward and gradients.

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

    length, heads, width, size, channels = 300, 4, 32, 16, 48
    seq_idx = (torch.arange(length) >= 100).int()[None]
    signs = ops.pack_signs(torch.randn(40, 96, generator=generator))
    labels = torch.randint(500, (length,), generator=generator)
    cases: list[tuple[str, Run, dict[str, Tensor], dict[str, object]]] = [
        (
            "ssd",
            ops.ssd,
            {
                "x": normal(1, length, heads, width),
                "dt": normal(1, length, heads) - 2,
                "A": -torch.rand(heads, generator=generator).to(dtype) * 15 - 1,
                "B": normal(1, length, 1, size),
                "C": normal(1, length, 1, size),
                "D": normal(heads),
                "z": normal(1, length, heads, width),
                "dt_bias": normal(heads),
                "initial_states": normal(1, heads, width, size),
            },
            {"dt_softplus": True, "seq_idx": seq_idx, "return_final_states": True},
        ),
        (
            "causal_conv1d",
            ops.causal_conv1d,
            {
                "x": normal(1, channels, length),
                "weight": normal(channels, 4),
                "bias": normal(channels),
                "initial_states": normal(1, channels, 3),
            },
            {"activation": "silu", "seq_idx": seq_idx, "return_final_states": True},
        ),
        (
            "selective_scan",
            ops.selective_scan,
            {
                "u": normal(1, channels, length),
                "delta": normal(1, channels, length) - 2,
                "A": -torch.rand(channels, size, generator=generator).to(dtype) * 15 - 1,
                "B": normal(1, size, length),
                "C": normal(1, size, length),
                "D": normal(channels),
                "z": normal(1, channels, length),
                "delta_bias": normal(channels),
                "initial_states": normal(1, channels, size),
            },
            {"delta_softplus": True, "seq_idx": seq_idx, "return_last_state": True},
        ),
        ("rms_norm", ops.rms_norm, {"x": normal(length, 64), "weight": normal(64), "z": normal(length, 64)}, {}),
        (
            "binary_linear",
            ops.binary_linear,
            {
                "x": normal(length, 96),
                "in_scale": normal(96),
                "out_scale": normal(40),
                "group_scale": normal(40, 3),
                "in_shift": normal(96),
                "out_shift": normal(40),
                "bias": normal(40),
            },
            {"signs": signs, "in_features": 96},
        ),
        *(
            (
                f"distillation_loss {divergence}",
                ops.distillation_loss,
                {"hidden_s": normal(length, 24), "head_s": normal(500, 24)},
                {
                    "hidden_t": normal(length, 32),
                    "head_t": normal(500, 32),
                    "labels": labels,
                    "divergence": divergence,
                    "temperature": 2.0,
                    "hard_share": 0.3,
                    "chunk_tokens": 128,
                },
            )
            for divergence in ops.DIVERGENCES
        ),
    ]
    rows = []
    for name, run, inputs, options in cases:
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
    unpacked = ops.unpack_signs(signs.to(device), 96).double().cpu()
    rows.append(("unpack_signs: output 1", _relative_error(unpacked, ops.unpack_signs(signs, 96, backend="naive"))))
    return rows


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
