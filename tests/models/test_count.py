import pytest
import torch
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, ScaledSign, binarize_, pack_
from bimamba_lit.models.count import count_parameters, true_bits

# arXiv 2411.11843: d_model, layers, vocabulary, share of weights binarized in percent, fp16 GiB, 1-bit GiB.
PAPER = [
    (1536, 48, 50288, 90.0, 1.453, 0.228),
    (1536, 48, 32000, 93.3, None, 0.176),
    (2048, 48, 50288, 92.2, 2.503, 0.340),
    (2048, 48, 32000, 94.9, None, 0.270),
    (2560, 64, 50288, 95.2, 5.034, 0.545),
    (2560, 64, 32000, 96.8, None, 0.458),
]


def gib(bits):
    return bits / 8 / 2**30


@pytest.mark.parametrize(("d_model", "n_layer", "vocab_size", "share", "fp16", "one_bit"), PAPER)
def test_the_sizes_are_those_of_the_paper(d_model, n_layer, vocab_size, share, fp16, one_bit):
    with torch.device("meta"):
        lm = MambaLM(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=vocab_size))
        dense = count_parameters(lm)
        assert dense.binarized == 0
        assert true_bits(lm) == 16 * dense.total
        if fp16 is not None:
            assert round(gib(true_bits(lm)), 3) == fp16
        binarize_(lm, FBI)
    assert round(100 * count_parameters(lm).binarized / dense.total, 1) == share
    assert round(gib(true_bits(lm)), 3) == one_bit


def test_every_part_is_counted_once(make):
    lm = make()
    projections = 2 * (32 * (64 + 64 + 8 + 8 + 4) + 64 * 32)
    convolution, per_head, norms = 2 * 80 * 5, 2 * 3 * 4, 2 * (32 + 64) + 32
    total = 64 * 32 + projections + convolution + per_head + norms
    assert count_parameters(lm) == (total, 0)
    assert count_parameters(make(tie_embeddings=False)) == (total + 64 * 32, 0)

    binarize_(lm, FBI)
    scales = 2 * 2 * (32 + 64)
    assert count_parameters(lm) == (total + scales, projections)
    assert true_bits(lm) == projections + 16 * (total - projections + scales)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("options", [{}, {"double_inputs": {"0": 0.5}}], ids=str)
def test_biases_of_binary_layers_are_counted(options, pack):
    model = binarize_(nn.Sequential(nn.Linear(64, 8)), ScaledSign, ["0"], **options)
    second = 32 if options else 0
    if pack:
        pack_(model)
    assert count_parameters(model) == (8 * 64 + 8 + 8, 8 * 64)
    assert true_bits(model) == 8 * (64 + second + 16 + 16) + (8 if options else 0)


def test_rows_of_signs_fill_whole_bytes():
    lm = MambaLM(MambaConfig(d_model=12, n_layer=1, vocab_size=8, d_state=4, headdim=8))
    dense = count_parameters(lm).total
    binarize_(lm, ScaledSign, targets=["in_proj"])
    layer = lm.backbone.layers[0].mixer.in_proj
    rest = dense - layer.out_features * 12
    assert true_bits(lm) == layer.out_features * (16 + 16) + 16 * rest  # 12 signs take two bytes; one scale a row


@pytest.mark.parametrize("scheme", [FBI, ScaledSign])
def test_packing_changes_no_count(make, scheme):
    lm = binarize_(make(), scheme)
    before = count_parameters(lm), true_bits(lm)
    assert (count_parameters(pack_(lm)), true_bits(lm)) == before


def test_a_head_made_binary_parts_from_the_embedding(make):
    lm = binarize_(make(), ScaledSign, targets=["lm_head"])
    assert count_parameters(lm).binarized == 64 * 32
    assert true_bits(lm) == true_bits(make()) + 64 * (32 + 16)
