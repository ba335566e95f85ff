"""BiLLM's two searches: which columns are salient, and where magnitudes part into two groups (arXiv 2402.04291).

Both look for the least squared error of binarizing every group by row, ``mu + alpha sign(w - mu)``, once (first order)
or once more on what is left (second order). Centring by the mean and taking ``alpha = mean abs(w - mu)`` lowers the
squared error of n entries by ``n mu^2``, then by ``n alpha^2``: the searches add up these gains and form no residual.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from bimamba_lit.binarize.ptb.half import sign

MOST_SALIENT = 49
_QUANTILES = torch.linspace(0.10, 0.90, 81, dtype=torch.float64)
_ROWS = 512  # at a time, so that they stay in a cache


def salient_columns(target: Tensor, saliency: Tensor) -> Tensor:
    """Return the mask ``(C,)`` of the columns that are binarized to second order.

    Args:
        target: What the error is measured on, ``(O, C)``.
        saliency: Importance of each column, ``(C,)``; the most important are taken, 1 to 49, as many as give the least
            error of second order on them and first order on the rest.
    """
    order = saliency.argsort(descending=True, stable=True)
    ranked = target[:, order]
    counts = range(1, min(MOST_SALIENT + 1, ranked.shape[1]))
    gains = [_gain(ranked[:, :count], 2) + _gain(ranked[:, count:], 1) for count in counts]
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[order[: 1 + int(torch.stack(gains).argmax()) if gains else 0]] = True
    return mask


def _gain(w: Tensor, order: int) -> Tensor:
    gain = torch.zeros((), dtype=torch.float64, device=w.device)
    for _ in range(order):
        mean = w.mean(1, keepdim=True)
        w = w - mean
        scale = w.abs().mean(1, keepdim=True)
        gain += w.shape[1] * (mean.double().square().sum() + scale.double().square().sum())
        if order > 1:
            w = w - scale * sign(w)
    return gain


def break_point(target: Tensor, order: int) -> Tensor:
    """Return the magnitude (a scalar) at which ``target`` ``(O, K)`` parts into two groups with least error.

    It is one of 81 quantiles, from 0.10 to 0.90, of the magnitudes. Groups are binarized to ``order`` by row.
    """
    if not target.numel():
        return target.new_zeros(())
    magnitudes = target.abs().flatten().sort().values.double()
    places = _QUANTILES.to(target.device) * (len(magnitudes) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(magnitudes) - 1)
    points = magnitudes[below].lerp(magnitudes[above], places - below)
    gains = torch.stack([_SortedRows(rows).gains(points, order) for rows in target.split(_ROWS)]).sum(0)
    return points[gains.argmax()].to(target.dtype)


class _SortedRows:
    """Rows in ascending order with their running sums: sums over ranges of values without touching the entries.

    Legend: O rows, K columns, Q points, P ranges that make up a group.
    """

    def __init__(self, rows: Tensor) -> None:
        self.values = rows.sort(1).values
        self.sums = pad(self.values.double().cumsum(1), (1, 0))

    def gains(self, points: Tensor, order: int) -> Tensor:
        """Return the gain ``(Q,)`` of parting the rows at each magnitude of ``points`` ``(Q,)``."""
        points = points.expand(len(self.values), 1, -1)
        first, last = self._place(-points, right=True), self._place(points)
        start, end = torch.zeros_like(first), torch.full_like(first, self.values.shape[1])
        large = self._gain(torch.cat([start, last], 1), torch.cat([first, end], 1), order)
        return self._gain(first, last, order) + large

    def _gain(self, low: Tensor, high: Tensor, order: int) -> Tensor:
        """Return the gain ``(Q,)`` of the groups of sorted entries from ``low`` to ``high`` ``(O, P, Q)``."""
        count = (high - low).sum(1).clamp(min=1)
        low_sum, high_sum = self._sum(low), self._sum(high)
        centre = torch.zeros_like(low_sum)  # of each range; what is left of an entry is its value less this
        gain = torch.zeros_like(centre[0, 0])
        for _ in range(order):
            mean = (high_sum - low_sum - centre * (high - low)).sum(1) / count
            centre = centre + mean.unsqueeze(1)
            middle = self._place(centre).clamp(low, high)
            middle_sum = self._sum(middle)
            scale = (low_sum + high_sum - 2 * middle_sum - centre * (low + high - 2 * middle)).sum(1) / count
            gain += (count * (mean.square() + scale.square())).sum(0)
            low, high = torch.cat([low, middle], 1), torch.cat([middle, high], 1)
            low_sum, high_sum = torch.cat([low_sum, middle_sum], 1), torch.cat([middle_sum, high_sum], 1)
            centre = torch.cat([centre - scale.unsqueeze(1), centre + scale.unsqueeze(1)], 1)
        return gain

    def _place(self, values: Tensor, right: bool = False) -> Tensor:
        flat = values.to(self.values.dtype).flatten(1).contiguous()
        return torch.searchsorted(self.values, flat, right=right).view(values.shape)

    def _sum(self, places: Tensor) -> Tensor:
        return self.sums.gather(1, places.flatten(1)).view(places.shape)
