"""Which blocks step as one op, and that the op is given what they are made of."""

import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.binarize import FBI, ScaledSign, Sign, binarize_, pack_
from bimamba_lit.models.packed_step import packed_parameters


def make(scheme=FBI, activation_bits=None, targets=("in_proj", "out_proj"), double_inputs=None, **options):
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=11, headdim=32, d_state=8, **options)
    lm = MambaLM(config).eval()
    return pack_(binarize_(lm, scheme, targets=targets, double_inputs=double_inputs or {}), activation_bits)


@pytest.mark.parametrize(
    ("scheme", "double_inputs"),
    [
        (FBI, {}),
        (lambda layer: FBI(layer, "row"), {}),
        (Sign, {}),
        (ScaledSign, {}),
        (FBI, {"*": 0.6}),
        (FBI, {"in_proj": [0.5, 0], "out_proj": [1, 0.25]}),
    ],
)
@torch.no_grad()
def test_the_op_does_what_the_blocks_do(scheme, double_inputs):
    lm = make(scheme, double_inputs=double_inputs)
    blocks, states = lm.backbone.layers, lm.prefill(torch.tensor([[3, 1, 4]]), lm.init_state(1))[1].layers
    x = torch.randn(1, 64)
    y, conv_states, ssm_states = ops.packed_blocks(
        x,
        [state.conv for state in states],
        [state.ssm for state in states],
        [packed_parameters(block) for block in blocks],
        backend="naive",
    )
    for block, state, conv, ssm in zip(blocks, states, conv_states, ssm_states, strict=True):
        x, moved = block.step(x, state)
        torch.testing.assert_close(conv, moved.conv)
        torch.testing.assert_close(ssm, moved.ssm)
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_bits": 8},
        {"targets": ("in_proj",)},
        {"ngroups": 2},
        {"mixer": "mamba"},
    ],
)
def test_other_blocks_step_as_they_are(options):
    assert packed_parameters(make(**options).backbone.layers[0]) is None
