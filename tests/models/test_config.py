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


@pytest.mark.parametrize("d_state", [None, 16])
@pytest.mark.parametrize("mixer", ["mamba2", "mamba", ["mamba2", "mamba2"], ["mamba", "mamba2"]])
def test_it_survives_json(mixer, d_state):
    config = MambaConfig(**SMALL, d_state=d_state, tie_embeddings=False, norm_eps=1e-6, mixer=mixer)
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_from_before_mamba_1_is_read():
    values = MambaConfig(**SMALL).to_dict()
    del values["dt_rank"]
    assert MambaConfig.from_dict(values) == MambaConfig(**SMALL)


def test_the_defaults_of_mamba_1_are_those_of_mamba_ssm():
    config = MambaConfig(d_model=100, n_layer=2, mixer="mamba")
    assert (config.d_state, config.dt_rank) == (16, 7)
    given = MambaConfig(d_model=100, n_layer=2, mixer="mamba", d_state=8, dt_rank=5)
    assert (given.d_state, given.dt_rank) == (8, 5)
    assert MambaConfig(d_model=128, n_layer=2).dt_rank is None


def test_each_kind_has_its_own_default_of_d_state_where_they_are_mixed():
    config = MambaConfig(**SMALL, mixer=["mamba", "mamba2"])
    layers = [config.of_layer(layer) for layer in range(2)]
    assert [(layer.mixer, layer.d_state) for layer in layers] == [("mamba", 16), ("mamba2", 128)]
    given = MambaConfig(**SMALL, mixer=["mamba", "mamba2"], d_state=8)
    assert [given.of_layer(layer).d_state for layer in range(2)] == [8, 8]


def test_heads_matter_to_mamba_2_only():
    assert MambaConfig(**SMALL, headdim=24, mixer="mamba").d_inner == 64
    with pytest.raises(UserError, match="headdim must divide"):
        MambaConfig(**SMALL, headdim=24, mixer=["mamba", "mamba2"])


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
        ({"mixer": "mamba1"}, 'mixer must be "mamba2" or "mamba", or a list of them, not \'mamba1\''),
        ({"mixer": 2}, "mixer must be"),
        ({"mixer": [["mamba"], "mamba"]}, "mixer must be"),
        ({"dt_rank": 0}, "dt_rank must be a positive integer, not 0"),
        ({"mixer": "mamba", "dt_rank": "auto"}, "dt_rank must be a positive integer, not 'auto'"),
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
