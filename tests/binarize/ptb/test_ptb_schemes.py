"""Every post-training scheme: one row in SCHEMES, held to its stored form, its true size and the order of errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bimamba_lit import ops
from bimamba_lit.binarize import ptb
from bimamba_lit.binarize.linear import compose
from bimamba_lit.errors import UserError

SCHEMES = {
    "sign": ptb.Sign(),
    "scaled sign": ptb.ScaledSign(),
    "scaled sign, centred": ptb.ScaledSign(centred_rows=True),
    "ternary": ptb.Ternary(),
    "2 bits": ptb.TwoBit(),
    **{f"GPTQ-{bits}": ptb.GPTQ(bits, 32) for bits in (1, 2, 3, 4, 8)},
    "GPTQ-1, one group": ptb.GPTQ(1, None),
    "GPTQ-3, one group": ptb.GPTQ(3, None),
    "PB-LLM": ptb.PBLLM(),
    "PB-LLM, groups": ptb.PBLLM(0.2, 32),
    "PB-LLM, nothing salient": ptb.PBLLM(0.0),
    "PB-LLM, all salient": ptb.PBLLM(1.0),
    "BiLLM": ptb.BiLLM(),
    "BiLLM, released": ptb.BiLLM("released"),
    **{repr(arb(groups)): arb(groups) for arb in (ptb.ARB, ptb.ARBX, ptb.ARBRC) for groups in (True, False)},
}
ROWS = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
BINARY = pytest.mark.parametrize(
    "scheme", [ptb.Sign(), ptb.ScaledSign(), ptb.ScaledSign(True), ptb.GPTQ(1, None)], ids=repr
)


@ROWS
def test_the_weight_is_what_the_parts_decode_to_and_their_bytes_are_its_size(scheme, layer, tmp_path):
    weight, hessian = layer("correlated", 24, 160)
    result = scheme.fit(weight, hessian)
    assert result.weight.shape == weight.shape and result.weight.dtype == torch.float32
    path = tmp_path / "layer.safetensors"
    save_file(result.parts, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert result.bits == sum(result.storage().values()) == 8 * (path.stat().st_size - 8 - header)
    again = type(scheme)(**scheme.options())
    assert repr(again) == repr(scheme)
    assert torch.equal(again.decode(load_file(path), 24, 160), result.weight)


@ROWS
def test_the_same_layer_gives_the_same_result_and_stays_as_it_was(scheme, layer):
    weight, hessian = layer("correlated", 8, 160)
    before = weight.clone(), hessian.clone()
    first, second = scheme.fit(weight, hessian), scheme.fit(weight.double(), hessian.double())
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@ROWS
@pytest.mark.parametrize("shape", [(1, 64), (5, 32), (3, 1), (2, 160)], ids=str)
def test_small_layers(scheme, layer, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[1] % (scheme.options().get("group_size") or 1):
        with pytest.raises(UserError, match="group_size=32 does not divide the layer's 1 inputs"):
            scheme.fit(weight, torch.eye(shape[1]))
        return
    result = scheme.fit(weight, torch.eye(shape[1]))
    assert result.weight.shape == shape and result.weight.isfinite().all()


@ROWS
def test_an_all_zero_layer_stays_close_to_zero(scheme, layer):
    result = scheme.fit(torch.zeros(4, 64), torch.eye(64))
    assert result.weight.abs().max() <= (1.0 if isinstance(scheme, ptb.Sign) else 2.0**-24)


@BINARY
def test_single_sign_results_pack(scheme, layer):
    weight, hessian = layer("correlated", 12, 43)
    result = scheme.fit(weight, hessian)
    signs = result.parts["signs"]
    assert torch.equal(compose(ops.unpack_signs(signs, 43), result.terms), result.weight)
    x = torch.randn(5, 43, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.binary_linear(x, signs, 43, **result.terms), x @ result.weight.T)


def test_other_results_do_not_claim_to_pack(layer):
    weight, hessian = layer("correlated", 4, 64)
    for scheme in (ptb.GPTQ(1, 32), ptb.GPTQ(2, None), ptb.PBLLM(), ptb.BiLLM(), ptb.ARB(), ptb.ARBX(), ptb.ARBRC()):
        assert scheme.fit(weight, hessian).terms is None


def test_sign_and_scaled_sign_are_their_formulas(layer):
    weight, _ = layer("correlated", 6, 40)
    weight[0, 0] = 0.0  # counts as -1
    signs = torch.where(weight > 0, 1.0, -1.0)
    assert torch.equal(ptb.Sign().fit(weight).weight, signs)
    scales = weight.abs().mean(1, keepdim=True).half().float()
    assert torch.equal(ptb.ScaledSign().fit(weight).weight, scales * signs)
    mean = weight.mean(1, keepdim=True).half().float()
    left = weight - mean
    expected = left.abs().mean(1, keepdim=True).half().float() * torch.where(left > 0, 1.0, -1.0) + mean
    assert torch.equal(ptb.ScaledSign(centred_rows=True).fit(weight).weight, expected)


@pytest.mark.parametrize("kind", ["correlated", "trained"])
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_are_ordered(kind, seed, layer):
    weight, hessian = layer(kind, 96, 256, seed)
    schemes = {"sign": ptb.Sign(), "scaled": ptb.ScaledSign(), "BiLLM": ptb.BiLLM(), "PBLLM": ptb.PBLLM()}
    schemes |= {f"GPTQ{bits}": ptb.GPTQ(bits) for bits in (2, 3, 4, 8)}
    schemes |= {f"{arb.__name__}{cgb}": arb(cgb) for arb in (ptb.ARB, ptb.ARBX, ptb.ARBRC) for cgb in (True, False)}
    error = {
        name: ptb.proxy_error(weight, scheme.fit(weight, hessian).weight, hessian) for name, scheme in schemes.items()
    }
    for arb in ("ARB", "ARBX", "ARBRC"):
        assert error[f"{arb}True"] < error[f"{arb}False"] <= error["BiLLM"]
    assert error["ARBXFalse"] < error["ARBFalse"] and error["ARBXTrue"] < error["ARBTrue"]
    assert error["BiLLM"] < error["scaled"] < error["sign"]
    assert error["GPTQ8"] < error["GPTQ4"] < error["GPTQ3"] < error["GPTQ2"] < error["scaled"]
    assert error["PBLLM"] < error["scaled"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ROWS
def test_a_gpu_fits_as_well_as_a_cpu(scheme, layer):
    weight, hessian = layer("correlated", 64, 256)
    on_cpu, on_gpu = scheme.fit(weight, hessian), scheme.fit(weight.cuda(), hessian.cuda())
    assert all(part.is_cuda for part in on_gpu.parts.values())
    assert torch.equal(scheme.decode(on_gpu.parts, 64, 256), on_gpu.weight)
    errors = [ptb.proxy_error(weight, result.weight.cpu(), hessian) for result in (on_cpu, on_gpu)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02, abs=1e-6)
