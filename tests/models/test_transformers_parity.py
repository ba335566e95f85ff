"""Logits and every gradient against transformers' Mamba-2, an independent implementation, on the same weights."""

import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM

transformers = pytest.importorskip("transformers")

SHAPE = {"d_model": 64, "n_layer": 3, "vocab_size": 96, "d_state": 16, "headdim": 16, "ngroups": 2, "chunk_size": 16}


def name_there(name):
    """Return transformers' name of one of our parameters."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request):
    torch.manual_seed(0)
    tied = request.param
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=64,
            num_hidden_layers=3,
            vocab_size=96,
            state_size=16,
            head_dim=16,
            num_heads=8,
            n_groups=2,
            chunk_size=16,
            tie_word_embeddings=tied,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = MambaLM(MambaConfig(**SHAPE, tie_embeddings=tied))
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[name_there(name)] for name in ours.state_dict()})
    return ours, theirs.train()


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_and_every_gradient(pair, padding, error):
    ours, theirs = pair
    ids = torch.randint(96, (2, 45))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(0, 9) if padding == "left" else slice(36, 45)] = 0
    weight = torch.randn(2, 45, 96) * mask[..., None]

    results = []
    for model in pair:
        logits = model(input_ids=ids, attention_mask=None if padding is None else mask).logits
        (logits * weight).sum().backward()
        results.append(logits.detach()[mask.bool()])
    assert error(*results) < 1e-5

    expected = dict(theirs.named_parameters())
    assert {name_there(name) for name, _ in ours.named_parameters()} == expected.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert error(parameter.grad, expected[name_there(name)].grad) < 1e-4, name
