"""The salient entries at 8 bits, all others binary."""

import torch
from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.binarize.ptb.columns import round_columns
from bimamba_lit.binarize.ptb.grid import codes_on, fit_grid, pack_bits, pack_codes, unpack_bits, unpack_codes
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme, group_of
from bimamba_lit.errors import UserError

HIGH_BITS = 8


class PBLLM(PTBScheme):
    """Partial binarization with GPTQ's correction of errors: PB-LLM (arXiv 2310.00034, sections 3.2 and 3.3).

    An entry is salient where ``W^2 / U_ii^2`` is largest. Salient entries are rounded to 8 bits, the others to
    ``alpha sign(W - mu) + mu`` with ``mu`` and ``alpha = mean abs(W - mu)`` over the row's binary entries.

    Args:
        salient_share: Share of the entries kept at 8 bits.
        group_size: Inputs that share saliency threshold, scales and zero point; null for the whole row.
    """

    def __init__(self, salient_share: float = 0.1, group_size: int | None = None) -> None:
        if not 0 <= salient_share <= 1:
            raise UserError(f"PBLLM's salient_share is a share of the entries, 0 to 1, not {salient_share!r}")
        self.salient_share = salient_share
        self.group_size = group_size

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return codes, signs, which entry has which, and their numbers."""
        assert data is not None
        size = group_of(self.group_size, weight.shape[1])
        codes = torch.zeros_like(weight.T)
        positive, salient = torch.zeros_like(codes, dtype=torch.bool), torch.zeros_like(codes, dtype=torch.bool)
        groups: list[tuple[Tensor, ...]] = []

        def rounded(rest: Tensor, i: int) -> Tensor:
            if i % size == 0:
                group = rest[i : i + size]
                salient[i : i + size] = self._salient(group / data.factor.diagonal()[i : i + size, None])
                groups.append((*fit_grid(group, HIGH_BITS), *_binary_levels(group, ~salient[i : i + size])))
            scale, zero, alpha, mu = groups[-1]
            codes[i] = codes_on(rest[i], scale, zero, HIGH_BITS)
            positive[i] = rest[i] > mu
            return torch.where(salient[i], scale * (codes[i] - zero), torch.where(positive[i], mu + alpha, mu - alpha))

        round_columns(data, rounded)
        scales, zeros, alphas, mus = (torch.stack(values, 1) for values in zip(*groups, strict=True))
        chosen = salient.T
        return {
            "salient": pack_bits(chosen),
            "codes": pack_codes(codes.T[chosen].unsqueeze(0), HIGH_BITS),
            "code_scales": scales.half(),
            "zeros": zeros.to(torch.uint8),
            "signs": pack_bits(positive.T[~chosen].unsqueeze(0)),
            "scales": alphas.half(),
            "shifts": mus.half(),
        }

    def _salient(self, importance: Tensor) -> Tensor:
        """Return the mask of the share of entries of a group that matter most."""
        count = round(self.salient_share * importance.numel())
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask.view(-1)[importance.abs().flatten().topk(count).indices] = True
        return mask

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the weight ``(O, I)`` of 8-bit and binary entries."""
        salient = unpack_bits(parts["salient"], in_features)
        groups = parts["scales"].shape[1]
        scale, zero, alpha, mu = (
            parts[name].float().repeat_interleave(in_features // groups, 1)
            for name in ("code_scales", "zeros", "scales", "shifts")
        )
        weight = torch.empty(out_features, in_features, device=salient.device)
        codes = unpack_codes(parts["codes"], int(salient.sum()))[0]
        signs = ops.unpack_signs(parts["signs"], weight.numel() - len(codes))[0]
        weight[salient] = scale[salient] * (codes - zero[salient])
        weight[~salient] = alpha[~salient] * signs + mu[~salient]
        return weight


def _binary_levels(group: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``alpha`` and ``mu`` ``(O,)``, rounded to fp16, of the masked entries of a group ``(G, O)``."""
    count = mask.sum(0).clamp(min=1)
    mu = ((group * mask).sum(0) / count).half().float()
    return (((group - mu).abs() * mask).sum(0) / count).half().float(), mu
