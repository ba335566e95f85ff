"""Folders of mamba_ssm and of the released Bi-Mamba, against transformers' models with the same weights."""

import json

import pytest
import torch

from bimamba_lit import MambaLM
from bimamba_lit.binarize import FBI
from bimamba_lit.errors import UserError
from bimamba_lit.models.state_spaces_folder import state_spaces_config, to_state_spaces

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, "initializer_range": 0.1}
MODELS = {
    "Mamba1": lambda tied: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, tie_word_embeddings=tied)),
    "Mamba2": lambda tied: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **SIZES, head_dim=16, num_heads=4, n_groups=2, chunk_size=16, tie_word_embeddings=tied
        )
    ),
}
# As the hub's state-spaces/mamba-130m and mamba2-130m have them, but for the sizes.
CONFIGS = {
    "Mamba1": {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {"d_state": 8},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    },
    "Mamba2": {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2, "chunk_size": 16},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
}
PATTERNS = {"column": lambda w: (1, w.shape[1]), "row": lambda w: (w.shape[0], 1), "single": lambda w: (1,)}


def saved(kind, folder, tied=True, pattern=None, bins=1, **changes):
    """Write what mamba_ssm would; return transformers' model with the same, or the binary, weights."""
    torch.manual_seed(0)
    model = MODELS[kind](tied).eval()
    state = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, weight in model.state_dict().items():
            name = name.replace("embeddings", "embedding")
            state[name] = weight.clone() if name.endswith("proj.weight") else weight
            if pattern is not None and name.endswith(("in_proj.weight", "out_proj.weight")):
                scale, shift = torch.rand(PATTERNS[pattern](weight)), 0.1 * torch.randn(PATTERNS[pattern](weight))
                layer = name.removesuffix(".weight")
                state |= {f"{layer}.wscale": scale, f"{layer}.wbias": shift}
                weight.copy_(scale * torch.sign(weight) + shift)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | {"tie_embeddings": tied} | changes))
    if bins == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return model
    weight_map = {name: f"pytorch_model-{i % bins}.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def refused(folder):
    with pytest.raises(UserError) as told:
        MambaLM.from_pretrained(folder)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_state_spaces_folder(kind, tied, tmp_path, error):
    theirs = saved(kind, tmp_path, tied, bins=1 if tied else 3)
    ours = MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(61, (2, 41))
    logits = ours(ids).logits
    assert logits.shape[-1] == 61 and ours.backbone.embedding.weight.shape[0] == 64
    assert error(logits, theirs(ids).logits[..., :61]) < 1e-5
    assert (ours.lm_head.weight is ours.backbone.embedding.weight) == tied


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_released_bi_mamba_form(kind, pattern, tmp_path, error):
    theirs = saved(kind, tmp_path, pattern=pattern)
    ours = MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(61, (2, 41))
    assert error(ours(ids).logits, theirs(ids).logits[..., :61]) < 1e-5
    layer = ours.backbone.layers[1].mixer.in_proj
    assert isinstance(layer, FBI) and layer.pattern == pattern
    trained = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert torch.equal(layer.latent, trained["backbone.layers.1.mixer.in_proj.weight"])


def test_a_scale_without_a_shift_or_of_another_shape(tmp_path):
    saved("Mamba2", tmp_path, pattern="column")
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    name = "backbone.layers.1.mixer.out_proj"
    torch.save(state | {f"{name}.wscale": torch.ones(3, 2)}, file)
    assert f"{name} has a weight (32, 64), wscale (3, 2) and wbias (1, 64)" in refused(tmp_path)
    del state[f"{name}.wbias"]
    torch.save(state, file)
    assert f"lacks {name}.wbias" in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, "d_ssm is 16"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdm": 16}}, "did you mean 'headdim'?"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 1.0]}}, "dt_limit is [0.0, 1.0]"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx is [1]"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"n_layr": 2}, "did you mean 'n_layer'?"),
        ({"vocab_size": 90}, "backbone.embedding.weight (64, 32) float32 instead of (96, 32) float32"),
        ({"n_layer": 3}, "lacks backbone.layers.2."),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path, changes, words):
    saved("Mamba2", tmp_path, **changes)
    assert words in refused(tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_there_and_back(kind):
    config = state_spaces_config(CONFIGS[kind])
    assert state_spaces_config(to_state_spaces(config)) == config


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # by torch 2.14
def test_what_a_pickle_may_hold(tmp_path):
    saved("Mamba2", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    for content, words in [
        ([1, 2], "holds no mapping of names to tensors"),
        ({"a": 3}, "holds a, which is not a tensor with values"),
        ({"a": torch.eye(3).to_sparse()}, "holds a, which is not a tensor with values"),
        ({"a": torch.zeros(3, device="meta")}, "holds a, which is not a tensor with values"),
    ]:
        torch.save(content, file)
        assert words in refused(tmp_path)
