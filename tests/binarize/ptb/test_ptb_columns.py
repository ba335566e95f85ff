"""GPTQ and PB-LLM against a plain derivation: columns removed one by one from the Hessian's inverse, in float64."""

import pytest
import torch

from bimamba_lit.binarize import ptb
from bimamba_lit.errors import UserError


def damped(hessian):
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64), dead


def grid(values, bits):
    """Scale and zero point of one row's group, from the formula."""
    low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
    scale = torch.tensor((high - low) / (2**bits - 1)).half().double()
    return scale, torch.round(-low / scale)


def on_grid(value, scale, zero, bits):
    return scale * ((torch.round(value / scale) + zero).clamp(0, 2**bits - 1) - zero)


def column_by_column(weight, hessian, start_group, rounded):
    """Optimal brain surgeon: fix a column, move the others by the inverse of the Hessian of those not yet fixed."""
    damped_hessian, dead = damped(hessian)
    weight = weight.double().clone()
    weight[:, dead] = 0.0
    result = torch.zeros_like(weight)
    state = None
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped_hessian[i:, i:])
        state = start_group(weight, damped_hessian, i, state)
        for row in range(len(weight)):
            result[row, i] = rounded(weight[row, i], row, i, state)
            weight[row, i:] -= (weight[row, i] - result[row, i]) / inverse[0, 0] * inverse[0]
    return result


def plain_gptq(weight, hessian, bits, group_size):
    def start_group(rest, _, i, grids):
        return [grid(row[i : i + group_size], bits) for row in rest] if i % group_size == 0 else grids

    return column_by_column(
        weight, hessian, start_group, lambda value, row, i, grids: on_grid(value, *grids[row], bits)
    )


def plain_pbllm(weight, hessian, share):
    def start_group(rest, damped_hessian, i, state):
        if i:
            return state
        # U_jj^2, U the upper Cholesky factor of the inverse: the first entry of the inverse of what is left from j on
        left = [torch.linalg.inv(damped_hessian[j:, j:])[0, 0] for j in range(len(damped_hessian))]
        saliency = (rest**2 / torch.stack(left)).flatten()
        salient = torch.zeros_like(saliency, dtype=torch.bool)
        salient[saliency.argsort(descending=True)[: round(share * rest.numel())]] = True
        levels = []
        for row, mask in zip(rest, salient.view_as(rest), strict=True):
            binary = row[~mask]
            mean = binary.mean().half().double()
            levels.append((mask, grid(row, 8), mean, (binary - mean).abs().mean().half().double()))
        return levels

    def rounded(value, row, i, levels):
        mask, own_grid, mean, scale = levels[row]
        return on_grid(value, *own_grid, 8) if mask[i] else mean + scale if value > mean else mean - scale

    return column_by_column(weight, hessian, start_group, rounded)


def assert_agrees(result, expected, weight, hessian):
    """The same values but where float32 fell on the other side of a boundary, and the same error."""
    same = ((result.weight - expected.float()).abs() <= 1e-6).float().mean()
    assert same > 0.98
    error, plain = (ptb.proxy_error(weight, w, hessian) for w in (result.weight, expected))
    assert error == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("kind", ["correlated", "trained"])
def test_gptq_is_the_plain_derivation(bits, group_size, kind, layer):
    weight, hessian = layer(kind, 4, 144)  # more than one block of 128
    expected = plain_gptq(weight, hessian, bits, group_size or 144)
    assert_agrees(ptb.GPTQ(bits, group_size).fit(weight, hessian), expected, weight, hessian)


@pytest.mark.parametrize("side", [1, -1])
def test_a_grid_over_weights_of_one_sign_reaches_zero(side, layer):
    weight, hessian = layer("correlated", 4, 32)
    weight = side * (weight.abs() + 0.05)
    assert_agrees(ptb.GPTQ(4, None).fit(weight, hessian), plain_gptq(weight, hessian, 4, 32), weight, hessian)


def test_gptq_leaves_out_inputs_that_were_always_zero(layer):
    weight, hessian = layer("correlated", 4, 32)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    result = ptb.GPTQ(4, None).fit(weight, hessian)
    assert_agrees(result, plain_gptq(weight, hessian, 4, 32), weight, hessian)
    assert not result.weight[:, 5].any()


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_pbllm_is_the_plain_derivation(share, layer):
    weight, hessian = layer("correlated", 4, 144)
    assert_agrees(ptb.PBLLM(share).fit(weight, hessian), plain_pbllm(weight, hessian, share), weight, hessian)


def test_pbllm_keeps_the_share_of_entries_at_eight_bits(layer):
    weight, hessian = layer("correlated", 10, 64)
    parts = ptb.PBLLM(0.25).fit(weight, hessian).parts
    assert parts["codes"].nbytes == 160 and parts["signs"].nbytes == 60 and parts["salient"].nbytes == 80


def test_one_gptq_size_by_hand(layer):
    weight, hessian = layer("correlated", 10, 64)
    assert ptb.GPTQ(3, 32).fit(weight, hessian).storage() == {
        "codes": 3 * 10 * 64,
        "scales": 16 * 10 * 2,
        "zeros": 8 * 10 * 2,
    }


@pytest.mark.parametrize("bits", [0, 5, 16, "2"])
def test_bits_that_gptq_has_not(bits):
    with pytest.raises(UserError, match="bits are one of 1, 2, 3, 4, 8"):
        ptb.GPTQ(bits)


@pytest.mark.parametrize("scheme", [ptb.GPTQ(2, 48), ptb.PBLLM(0.1, 48), ptb.GPTQ(2, 0), ptb.GPTQ(2, -64)], ids=repr)
def test_groups_that_do_not_divide(scheme, layer):
    weight, hessian = layer("correlated", 4, 64)
    with pytest.raises(UserError, match="group_size=.* does not divide the layer's 64 inputs"):
        scheme.fit(weight, hessian)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(UserError, match="salient_share is a share of the entries, 0 to 1"):
        ptb.PBLLM(share)
