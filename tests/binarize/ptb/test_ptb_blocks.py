"""BiLLM and the ARB schemes against plain derivations in float64: loops over rows, brute searches, normal equations."""

from itertools import product

import pytest
import torch

from bimamba_lit.binarize import ptb
from bimamba_lit.binarize.ptb import split
from bimamba_lit.binarize.ptb.split import break_point, salient_columns

BLOCK = 128


def sign(values):
    return torch.where(values > 0, 1.0, -1.0).double()


def residual(values, order):
    """Binarize a vector around its mean, and what that leaves: shift, scales, signs."""
    shift, scales, signs = 0.0, [], []
    for _ in range(order if len(values) else 0):
        shift = shift + values.mean()
        values = values - values.mean()
        scales.append(values.abs().mean())
        signs.append(sign(values))
        values = values - scales[-1] * signs[-1]
    return shift, scales, signs


def values_of(shift, scales, signs):
    return shift + sum(scale * own for scale, own in zip(scales, signs, strict=True))


def squared_error(w, masks_and_orders):
    """The error of the residual approximation of groups of entries, row by row."""
    error = 0.0
    for mask, order in masks_and_orders:
        for row, own in zip(w, mask, strict=True):
            if own.any():
                error += (row[own] - values_of(*residual(row[own], order))).square().sum().item()
    return error


def plain_salient(target, saliency):
    ranking = saliency.argsort(descending=True)

    def mask(count):
        chosen = torch.zeros(target.shape, dtype=torch.bool)
        chosen[:, ranking[:count]] = True
        return chosen

    counts = range(1, min(50, target.shape[1]))
    return mask(min(counts, key=lambda count: squared_error(target, [(mask(count), 2), (~mask(count), 1)])))[0]


def plain_large(target, columns, order):
    """The entries of the columns whose magnitude is at least the best of 81 quantiles."""
    magnitudes = target.abs()
    quantiles = torch.quantile(magnitudes[:, columns].flatten(), torch.linspace(0.1, 0.9, 81).double())

    def error(point):
        large, small = magnitudes >= point, magnitudes < point
        return squared_error(target, [(large & columns, order), (small & columns, order)])

    return (magnitudes >= min(quantiles, key=error)) & columns


def plain_groups(target, saliency, column_groups):
    salient = plain_salient(target, saliency)
    large = plain_large(target, ~salient, 1)
    groups = [(~salient & ~large, 1), (large, 1)]
    if not column_groups:
        return [*groups, (salient.expand(target.shape), 2)]
    large = plain_large(target, salient, 2)
    return [*groups, (salient & ~large, 2), (large, 2)]


def row_by_row(fit):
    """Makes a binarizer of a group from one of a vector."""

    def binarize(w, mask, order, result):
        for row, own, out in zip(w, mask, result, strict=True):
            if own.any():
                shift, scales, signs = fit(row[own], order)
                out[own] = values_of(shift, scales, signs)

    return binarize


def refined(values, order):
    """ARB of a vector: shift, scales and signs in turn, 15 times."""
    shift, scales, signs = residual(values, order)
    for _ in range(15):
        shift = shift + (values - values_of(shift, scales, signs)).mean()
        for n in range(order):
            others = sum(scales[m] * signs[m] for m in range(order) if m != n)
            scales[n] = (signs[n] * (values - shift - others)).sum() / len(values)
        choices = list(product((-1.0, 1.0), repeat=order))
        levels = torch.stack([sum(s * scale for s, scale in zip(choice, scales, strict=True)) for choice in choices])
        best = (values[:, None] - shift - levels).abs().argmin(1)
        signs = [torch.tensor(choices, dtype=torch.float64)[best, n] for n in range(order)]
    return shift, scales, signs


def plain_arb_rc(w, mask, order, result):
    """Row and column scales of a group, each from the formula, 15 times."""
    kept = mask.double()
    rows, columns, signs, left = [], [], [], w * kept
    for _ in range(order):
        rows.append(left.abs().sum(1) / kept.sum(1).clamp(min=1))
        scaled = torch.where(rows[-1][:, None] > 0, left.abs() / rows[-1][:, None], 0.0)
        columns.append(scaled.sum(0) / kept.sum(0).clamp(min=1))
        signs.append(sign(left))
        left = (left - torch.outer(rows[-1], columns[-1]) * signs[-1]) * kept
    for _ in range(15):
        for n in range(order):
            wanted = w - sum(torch.outer(rows[m], columns[m]) * signs[m] for m in range(order) if m != n)
            b = columns[n] * signs[n] * kept
            rows[n] = (b * wanted).sum(1) / b.square().sum(1).clamp(min=1e-30)
            b = rows[n][:, None] * signs[n] * kept
            columns[n] = (b * wanted).sum(0) / b.square().sum(0).clamp(min=1e-30)
        if order == 2:
            first, second = (torch.outer(rows[n], columns[n]) for n in range(2))
            choices = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
            levels = choices[:, 0] * first[..., None] + choices[:, 1] * second[..., None]
            best = (w[..., None] - levels).abs().argmin(2)
            signs = [choices[best, n] for n in range(2)]
    total = sum(torch.outer(row, column) * own for row, column, own in zip(rows, columns, signs, strict=True))
    result[mask] = total[mask]


def plain_arb_x(w, groups, metric):
    """ARB's signs; then each number in turn to the root of the derivative of tr(R S R^T), row by row, 15 times."""
    result = torch.zeros_like(w)
    for index, row in enumerate(w):
        directions, numbers = [], []
        for mask, order in groups:
            own = mask[index]
            shift, scales, signs = refined(row[own], order) if own.any() else (0.0, [0.0] * order, [0.0] * order)
            for number, plane in [(shift, 1.0), *zip(scales, signs, strict=True)]:
                direction = torch.zeros_like(row)
                direction[own] = plane
                directions.append(direction)
                numbers.append(number)
        for _ in range(15):
            for j, direction in enumerate(directions):
                if direction.any():
                    others = row - sum(numbers[k] * d for k, d in enumerate(directions) if k != j)
                    numbers[j] = (direction @ metric @ others) / (direction @ metric @ direction)
        result[index] = sum(number * direction for number, direction in zip(numbers, directions, strict=True))
    return result


def plain_blocks(weight, hessian, binarize, column_groups, released=False):
    """The loop: after each block the rest moves to the least error that the fixed columns leave possible."""
    rest = weight.double().clone()
    hessian = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    diagonal = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        w = rest[:, start:stop]
        saliency = w.square() / diagonal[start:stop].square()
        groups = plain_groups(saliency if released else w, saliency.sum(0), column_groups)
        fitted = binarize(w, groups, hessian[start:stop, start:stop])
        moved = torch.linalg.solve(hessian[stop:, stop:], hessian[stop:, start:stop] @ (fitted - w).T).T
        rest[:, stop:] -= moved
        rest[:, start:stop] = fitted
    return rest


def by_group(binarize):
    def block(w, groups, metric):
        result = torch.zeros_like(w)
        for mask, order in groups:
            binarize(w, mask, order, result)
        return result

    return block


CASES = {
    "BiLLM": (ptb.BiLLM(), by_group(row_by_row(residual)), False),
    "BiLLM, released": (ptb.BiLLM("released"), by_group(row_by_row(residual)), False),
    "ARB": (ptb.ARB(False), by_group(row_by_row(refined)), False),
    "ARB, CGB": (ptb.ARB(), by_group(row_by_row(refined)), True),
    "ARB-X": (ptb.ARBX(False), plain_arb_x, False),
    "ARB-X, CGB": (ptb.ARBX(), plain_arb_x, True),
    "ARB-RC": (ptb.ARBRC(False), by_group(plain_arb_rc), False),
    "ARB-RC, CGB": (ptb.ARBRC(), by_group(plain_arb_rc), True),
}


@pytest.mark.parametrize(("scheme", "binarize", "column_groups"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", ["correlated", "trained"])
def test_a_block_scheme_is_its_plain_derivation(scheme, binarize, column_groups, kind, layer):
    weight, hessian = layer(kind, 6, BLOCK + 80)
    result = scheme.fit(weight, hessian)
    released = scheme.options().get("metric") == "released"
    expected = plain_blocks(weight, hessian, binarize, column_groups, released)
    scale = weight.abs().mean()
    same = ((result.weight - expected).abs() < 2e-3 * scale + 2e-3 * expected.abs()).double().mean()  # scales are fp16
    error, plain = (ptb.proxy_error(weight, w, hessian) for w in (result.weight, expected))
    assert same > 0.99
    assert error == pytest.approx(plain, rel=0.005)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_break_point_gives_the_least_error_of_all_quantiles(order, rows, monkeypatch):
    monkeypatch.setattr(split, "_ROWS", 3)  # at a time
    w = torch.randn(rows, 9, generator=torch.Generator().manual_seed(rows))
    expected = plain_large(w.double(), torch.ones(9, dtype=torch.bool), order)
    point = break_point(w, order)
    errors = [squared_error(w.double(), [(large, order), (~large, order)]) for large in (expected, w.abs() >= point)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-9)


@pytest.mark.parametrize("width", [2, 30, 90])
def test_the_salient_columns_give_the_least_error_of_all_counts(width):
    noise = torch.Generator().manual_seed(width)
    w, saliency = torch.randn(5, width, generator=noise), torch.rand(width, generator=noise)
    w[:, saliency > 0.8] *= 10
    mask = salient_columns(w, saliency)
    assert torch.equal(mask, plain_salient(w.double(), saliency))
    assert saliency[mask].min() > saliency[~mask].max()


def test_a_size_by_hand(layer):
    weight, hessian = layer("trained", 16, 2 * BLOCK)
    parts = ptb.ARB().fit(weight, hessian)
    salient = int(sum(bin(byte).count("1") for byte in parts.parts["salient"].flatten().tolist()))
    whole_bytes = lambda columns: 16 * 8 * -(-columns // 8)  # noqa: E731
    others = 2 * BLOCK - salient
    assert parts.storage() == {
        "salient": 2 * BLOCK,
        "signs": whole_bytes(others),
        "groups": whole_bytes(others),
        "scales": 2 * 16 * 2 * 16,  # blocks, rows, groups, bits
        "shifts": 2 * 16 * 2 * 16,
        "salient_signs": 2 * whole_bytes(salient),
        "salient_groups": whole_bytes(salient),
        "salient_scales": 2 * 16 * 2 * 2 * 16,  # two orders
        "salient_shifts": 2 * 16 * 2 * 16,
    }
    by_column = ptb.ARBRC().fit(weight, hessian).parts
    assert "shifts" not in by_column and by_column["column_scales"].shape[:2] == (1, 2)
    assert by_column["salient_column_scales"].shape[:2] == (2, 2)
