"""The distillation loss with softmax, divergence and gradient in one kernel, a few tokens at a time.

The products with the two heads are cuBLAS's, in float32 out of 16-bit inputs, into logits of `chunk_tokens` tokens; the
kernel reads them twice, first for the denominators and then for the loss and its gradient, which it writes narrow; two
more products carry that to the hidden states and the head. Nothing waits for the device: positions that do not count
are worked through like the others, with gradient zero, so that shapes are known and the op can be captured in a CUDA
graph. No sum depends on the order in which programs run.

Legend: D_s and D_t widths of student and teacher, V vocabulary, n tokens of a chunk, T tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import INTERPRETER, CompileCase, architecture, configuration
from bimamba_lit.kernels.distillation_loss import chunked
from bimamba_lit.kernels.distillation_loss.chunked import product_dtype

_DIVERGENCES = {"soft_ce": 1, "forward_kl": 2, "reverse_kl": 3}
_FP16_SCALE = 256.0  # a probability of 1 / 50288 is subnormal in float16
_ALIGNED = 64  # elements; rows of logits begin where wide loads can


def distillation_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    hidden_t: Tensor | None = None,
    head_t: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: str = "soft_ce",
    temperature: float = 1.0,
    hard_share: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Compute what `naive.distillation_loss` computes, holding logits of `chunk_tokens` tokens at most.

    With n = min(chunk_tokens, tokens), D_s the student's width and T tokens, 16-bit inputs need at most
    ``10 * n * V + 4 * D_s * V + 2 * D_s * T`` bytes beside the inputs, and the gradients once more in the backward
    pass. In float64 it is `chunked.distillation_loss`.
    """
    narrow = product_dtype(hidden_s, head_s)
    if narrow == torch.float64:
        return chunked.distillation_loss(
            hidden_s, head_s, hidden_t, head_t, labels, divergence=divergence, temperature=temperature,
            hard_share=hard_share, mask=mask, chunk_tokens=chunk_tokens,
        )  # fmt: skip
    teacher, weight_t, narrow_t = None, None, narrow
    if hidden_t is not None and head_t is not None and hard_share < 1.0:
        teacher, weight_t, narrow_t = hidden_t.detach().flatten(0, -2), head_t.detach(), product_dtype(hidden_t, head_t)
    counted = mask.flatten() if mask is not None else None
    if labels is not None:
        labels = labels.flatten()
        counted = labels != -100 if counted is None else counted & (labels != -100)
    student, recorded = hidden_s.flatten(0, -2), torch.is_grad_enabled()
    loss, *_ = _op(
        student, head_s, teacher, weight_t, labels if hard_share > 0.0 else None, counted, narrow, narrow_t,
        divergence, float(temperature), float(hard_share), chunk_tokens, recorded and student.requires_grad,
        recorded and head_s.requires_grad,
    )  # fmt: skip
    return loss


@torch.library.custom_op("bimamba_lit::distillation_loss", mutates_args=())
def _op(
    hidden_s: Tensor, head_s: Tensor, hidden_t: Tensor | None, head_t: Tensor | None, labels: Tensor | None,
    counted: Tensor | None, narrow: torch.dtype, narrow_t: torch.dtype, divergence: str, temperature: float,
    hard_share: float, chunk_tokens: int, want_hidden: bool, want_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, its gradients divided by a share (or nothing), and the share."""
    with torch.autocast(hidden_s.device.type, enabled=False):
        return _launch(
            hidden_s, head_s, hidden_t, head_t, labels, counted, narrow, narrow_t, divergence, temperature, hard_share,
            chunk_tokens, want_hidden, want_head,
        )  # fmt: skip


@_op.register_fake
def _fake(
    hidden_s: Tensor, head_s: Tensor, hidden_t: Tensor | None, head_t: Tensor | None, labels: Tensor | None,
    counted: Tensor | None, narrow: torch.dtype, narrow_t: torch.dtype, divergence: str, temperature: float,
    hard_share: float, chunk_tokens: int, want_hidden: bool, want_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scalar = hidden_s.new_empty((), dtype=torch.float32)
    return scalar, *_gradients(hidden_s, head_s, want_hidden, want_head), torch.empty_like(scalar)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *found, share = ctx.saved_tensors
    pairs = zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return *((g * (grad * share)).to(dtype) if needed else None for g, dtype, needed in pairs), *(None,) * 12


_op.register_autograd(_backward, setup_context=_setup)


def _gradients(hidden_s: Tensor, head_s: Tensor, want_hidden: bool, want_head: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden_s, memory_format=torch.contiguous_format) if want_hidden else hidden_s.new_empty(0),
        head_s.new_zeros(head_s.shape if want_head else 0, dtype=torch.float32),
    )


def _launch(
    hidden_s: Tensor, head_s: Tensor, hidden_t: Tensor | None, head_t: Tensor | None, labels: Tensor | None,
    counted: Tensor | None, narrow: torch.dtype, narrow_t: torch.dtype, divergence: str, temperature: float,
    hard_share: float, chunk_tokens: int, want_hidden: bool, want_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, vocabulary = len(hidden_s), len(head_s)
    rows = min(chunk_tokens, tokens)
    g_hidden, g_head = _gradients(hidden_s, head_s, want_hidden, want_head)
    want = want_hidden or want_head
    weight_s = head_s.to(narrow)
    z_s = _scratch(rows, vocabulary, torch.float32, hidden_s)
    g = z_s if narrow == torch.float32 or not want else _scratch(rows, vocabulary, narrow, hidden_s)
    z_t, weight_t = z_s, None
    if hidden_t is not None and head_t is not None:
        weight_t = head_t.to(narrow_t)
        z_t = _scratch(rows, vocabulary, torch.float32, hidden_s)
    scale = _FP16_SCALE if narrow == torch.float16 else 1.0
    losses = hidden_s.new_empty(tokens, dtype=torch.float32)
    chosen = configuration("distillation_loss/rows", torch.float32, vocabulary, hidden_s.device)
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        live = part.stop - part.start
        h = hidden_s[part].to(narrow)
        if counted is not None:
            # A position that does not count may hold anything, and 0 * NaN is NaN.
            h = h.masked_fill(~counted[part, None], 0)
        _product(h, weight_s.t(), z_s[:live])
        if hidden_t is not None and weight_t is not None:
            _product(hidden_t[part].to(narrow_t), weight_t.t(), z_t[:live])
        _rows[(live,)](
            z_s, z_t, z_s if labels is None else labels[part], z_s if counted is None else counted[part],
            losses[part], g, vocabulary, z_s.stride(0), g.stride(0), 1.0 / temperature, hard_share, scale,
            SOFT=0 if weight_t is None else _DIVERGENCES[divergence], HARD=labels is not None,
            SAME=temperature == 1.0, COUNTED=counted is not None, GRADIENT=want, **chosen.launch(),
        )  # fmt: skip
        if want_hidden:
            _product(g[:live], weight_s, g_hidden[part])
        if want_head:
            _add_product(g[:live].t(), h, g_head)
    share = hidden_s.new_ones((), dtype=torch.float32)
    if counted is not None:
        share = share / counted.sum().clamp(min=1)
    else:
        share = share / max(tokens, 1)
    return losses.sum() * share, g_hidden, g_head, share / scale


def _scratch(rows: int, vocabulary: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return like.new_empty(rows, triton.cdiv(vocabulary, _ALIGNED) * _ALIGNED, dtype=dtype)[:, :vocabulary]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b, summed in float32, into `out` of the same dtype or float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif architecture(a.device) != INTERPRETER and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add a @ b, summed in float32, to `out` of float32."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif architecture(a.device) != INTERPRETER:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += a.float() @ b.float()


@triton.jit
def _rows(
    z_s, z_t, labels, counted, losses, g, vocabulary, stride_z, stride_g, inverse_temperature, hard_share, scale,
    SOFT: tl.constexpr, HARD: tl.constexpr, SAME: tl.constexpr, COUNTED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduce a row of logits to its loss and turn it into its gradient; SOFT is a divergence, 0 for none."""
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_z
    z_t += row * stride_z
    g += row * stride_g
    live = True
    if COUNTED:
        live = tl.load(counted + row) != 0
    if live:
        label = -1
        picked = 0.0
        if HARD:
            # Read here, before the gradient may overwrite it; a label outside the vocabulary makes the loss NaN.
            label = tl.load(labels + row)
            picked = tl.load(z_s + label, (label >= 0) & (label < vocabulary), float("nan"))
        # Largest entry and sum of exponentials: of the student, the teacher, and of the student at temperature 1.
        top_s = -float("inf")
        top_t = -float("inf")
        top_1 = -float("inf")
        sum_s = tl.zeros((BLOCK,), tl.float32)
        sum_t = tl.zeros((BLOCK,), tl.float32)
        sum_1 = tl.zeros((BLOCK,), tl.float32)
        cross = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            z = tl.load(z_s + columns, inside, -float("inf"))
            if HARD and not (SOFT and SAME):
                new = tl.maximum(top_1, tl.max(z, 0))
                sum_1 = sum_1 * tl.exp(top_1 - new) + tl.exp(z - new)
                top_1 = new
            if SOFT:
                a = z * inverse_temperature
                b = tl.load(z_t + columns, inside, -float("inf")) * inverse_temperature
                new_s = tl.maximum(top_s, tl.max(a, 0))
                new_t = tl.maximum(top_t, tl.max(b, 0))
                e_s = tl.exp(a - new_s)
                e_t = tl.exp(b - new_t)
                shrink_s = tl.exp(top_s - new_s)
                shrink_t = tl.exp(top_t - new_t)
                sum_s = sum_s * shrink_s + e_s
                sum_t = sum_t * shrink_t + e_t
                a = tl.where(inside, a, 0.0)
                b = tl.where(inside, b, 0.0)
                if SOFT == 1:
                    cross = cross * shrink_t + e_t * a
                elif SOFT == 2:
                    cross = cross * shrink_t + e_t * (b - a)
                else:
                    cross = cross * shrink_s + e_s * (a - b)
                top_s = new_s
                top_t = new_t
        loss = 0.0
        log_1 = 0.0
        log_s = 0.0
        log_t = 0.0
        soft = 0.0
        if SOFT:
            total_s = tl.sum(sum_s, 0)
            total_t = tl.sum(sum_t, 0)
            log_s = top_s + tl.log(total_s)
            log_t = top_t + tl.log(total_t)
            if SOFT == 1:
                soft = log_s - tl.sum(cross, 0) / total_t
            elif SOFT == 2:
                soft = tl.sum(cross, 0) / total_t - log_t + log_s
            else:
                soft = tl.sum(cross, 0) / total_s - log_s + log_t
            loss = (1.0 - hard_share) * soft / (inverse_temperature * inverse_temperature)
        if HARD:
            if SOFT and SAME:
                log_1 = log_s
            else:
                log_1 = top_1 + tl.log(tl.sum(sum_1, 0))
            loss += hard_share * (log_1 - picked)
        tl.store(losses + row, loss)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < vocabulary
                z = tl.load(z_s + columns, inside, 0.0)
                slope = tl.zeros((BLOCK,), tl.float32)
                if SOFT:
                    a = z * inverse_temperature - log_s
                    b = tl.load(z_t + columns, inside, 0.0) * inverse_temperature - log_t
                    if SOFT == 3:
                        slope = tl.exp(a) * (a - b - soft)
                    else:
                        slope = tl.exp(a) - tl.exp(b)
                    slope = slope * ((1.0 - hard_share) / inverse_temperature)
                if HARD:
                    slope += hard_share * (tl.exp(z - log_1) - tl.where(columns == label, 1.0, 0.0))
                tl.store(g + columns, (slope * scale).to(g.dtype.element_ty), inside)
    else:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(g + columns, tl.zeros((BLOCK,), g.dtype.element_ty), columns < vocabulary)


def compile_cases() -> list[CompileCase]:
    """Return launches of each shape of the kernel."""

    def case(name: str, dtype: torch.dtype, vocabulary: int, representative: bool = False, **options: Any) -> Any:
        def call() -> object:
            def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(*shape, dtype=dtype, device="meta")

            soft, hard = options.get("hard_share", 0.0) < 1.0, options.get("hard_share", 0.0) > 0.0
            gradients = options.get("grad", True)
            return _launch(
                empty(2048, 1536), empty(vocabulary, 1536), empty(2048, 2048) if soft else None,
                empty(vocabulary, 2048) if soft else None, empty(2048, dtype=torch.int64) if hard else None,
                empty(2048, dtype=torch.bool), dtype, dtype, options.get("divergence", "soft_ce"),
                options.get("temperature", 1.0), options.get("hard_share", 0.0), 1024, gradients, gradients,
            )  # fmt: skip

        return CompileCase(name, call, representative)

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        case("soft_ce bf16", bf16, 50288, representative=True),
        case("soft_ce bf16, no gradient", bf16, 50288, grad=False),
        case(
            "forward_kl bf16, temperature, labels",
            bf16,
            50277,
            True,
            divergence="forward_kl",
            temperature=2.0,
            hard_share=0.5,
        ),
        case("reverse_kl fp16", torch.float16, 128256, divergence="reverse_kl"),
        case("labels alone bf16", bf16, 32000, hard_share=1.0),
        case("soft_ce fp32 and labels", fp32, 512, hard_share=0.5),
    ]
