import json

import pytest

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.errors import UserError

SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 61}


def test_the_defaults_are_those_of_mamba_ssm():
    config = MambaConfig(d_model=2048, n_layer=48, vocab_size=50277)
    assert (config.d_state, config.d_conv, config.expand, config.headdim) == (128, 4, 2, 64)
    assert (config.ngroups, config.chunk_size, config.norm_eps) == (1, 256, 1e-5)
    assert (config.residual_in_fp32, config.tie_embeddings, config.mixer) == (True, True, "mamba2")
    assert (config.d_inner, config.nheads, config.padded_vocab_size) == (4096, 64, 50280)


def test_a_vocabulary_that_is_a_multiple_already_gets_no_padding():
    assert MambaConfig(**SMALL | {"vocab_size": 64}).padded_vocab_size == 64
    assert MambaConfig(**SMALL, pad_vocab_size_multiple=1).padded_vocab_size == 61


@pytest.mark.parametrize("mixer", ["mamba2", ["mamba2", "mamba2"]])
def test_it_survives_json(mixer):
    config = MambaConfig(**SMALL, d_state=16, tie_embeddings=False, norm_eps=1e-6, mixer=mixer)
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_model": 0}, "d_model must be a positive integer, not 0"),
        ({"n_layer": -1}, "n_layer"),
        ({"vocab_size": 61.0}, "vocab_size must be a positive integer, not 61.0"),
        ({"d_conv": True}, "d_conv"),
        ({"d_state": "8"}, "d_state"),
        ({"headdim": 24}, "24 does not divide 2 * 32 = 64"),
        ({"headdim": 32, "ngroups": 3}, "number of heads, expand * d_model / headdim = 2"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"norm_eps": True}, "norm_eps"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be true or false, not 'no'"),
        ({"mixer": "mamba"}, 'mixer must be "mamba2"'),
        ({"mixer": ["mamba2", "attention"]}, "'attention'"),
        ({"mixer": ["mamba2"]}, "mixer lists 1 mixers for n_layer = 2 blocks"),
        ({"head_dim": 16}, "no key 'head_dim'; did you mean 'headdim'?"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(UserError) as caught:
        MambaConfig.from_dict(SMALL | change)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", SMALL)
def test_a_missing_size_is_named(key):
    with pytest.raises(UserError, match=f"lacks the key '{key}'"):
        MambaConfig.from_dict({name: value for name, value in SMALL.items() if name != key})


def test_vocab_size_may_follow_the_data_but_a_model_needs_it() -> None:
    config = MambaConfig(d_model=32, n_layer=2)
    assert config.vocab_size is None
    with pytest.raises(UserError, match="vocab_size is not set"):
        MambaLM(config)
