import math

import pytest
import torch
from torch.nn.functional import softplus

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, BinaryLinear, PackedLinear, ScaledSign, binarize_, pack_
from bimamba_lit.models.count import count_parameters, true_bits
from bimamba_lit.models.generate import generate
from bimamba_lit.models.mamba1 import Mamba1
from bimamba_lit.models.mamba2 import Mamba2

MIXERS = ["mamba", ["mamba2", "mamba"], ["mamba", "mamba2"]]


@pytest.fixture
def ids():
    return torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["dense", "latent", "packed"])
def form(request):
    return request.param


@pytest.fixture(params=MIXERS, ids=str)
def lm(request, form, make):
    lm = make(mixer=request.param)
    if form != "dense":
        binarize_(lm, FBI)
    if form == "packed":
        pack_(lm)
    return lm


def test_prefill_in_pieces_equals_the_full_forward(lm, ids, error):
    state, logits = lm.init_state(2), []
    for piece in ids.split([8, 1, 2, 10], dim=1):
        part, state = lm.prefill(piece, state)
        logits.append(part)
    assert error(torch.cat(logits, 1), lm(ids).logits) < 1e-5


def test_steps_after_a_prefill_equal_the_full_forward(lm, ids, error):
    logits, state = lm.prefill(ids[:, :5], lm.init_state(2))
    logits = list(logits.unbind(1))
    for token in ids[:, 5:].unbind(1):
        step, state = lm.step(token, state)
        logits.append(step)
    assert error(torch.stack(logits, 1), lm(ids).logits) < 1e-5


def test_steps_alone_equal_the_full_forward_in_double_precision(make, ids, error):
    lm = make(mixer="mamba").double()
    state, logits = lm.init_state(2), []
    for token in ids.unbind(1):
        step, state = lm.step(token, state)
        logits.append(step)
    assert error(torch.stack(logits, 1), lm(ids).logits) < 1e-12, "something is rounded to single precision"


def test_a_single_sequence_of_a_wide_model_steps_right(error):
    # Its weights are large enough for the form of Linear that is for one token.
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=384, n_layer=2, vocab_size=400, mixer="mamba"))
    ids = torch.randint(400, (1, 6))
    state, logits = lm.init_state(1), []
    for token in ids.unbind(1):
        step, state = lm.step(token, state)
        logits.append(step)
    assert error(torch.stack(logits, 1), lm(ids).logits) < 1e-5


def test_the_state_does_not_grow_and_carries_no_graph(lm, ids):
    state = lm.init_state(2)
    shapes = [[(part.shape, part.dtype) for part in layer] for layer in state.layers]
    _, state = lm.prefill(ids, state)
    for token in [None, *ids.unbind(1)]:
        if token is not None:
            _, state = lm.step(token, state)
        assert [[(part.shape, part.dtype) for part in layer] for layer in state.layers] == shapes
        for part in (part for layer in state.layers for part in layer):
            assert not part.requires_grad
            assert part.untyped_storage().nbytes() <= 2 * part.nbytes


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(lm, ids, side, error):
    pad = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    kept = slice(6, None) if side == "left" else slice(0, 21)
    mask = torch.zeros_like(padded)
    mask[:, kept] = 1
    assert error(lm(padded, attention_mask=mask).logits[:, kept], lm(ids).logits) < 1e-5
    if side == "left":  # else the test could not tell a mask from none
        assert error(lm(padded).logits[:, kept], lm(ids).logits) > 1e-2


def test_documents_in_one_row_do_not_see_each_other(lm, ids, error):
    lengths = [9, 1, 11]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    apart = torch.cat([lm(document).logits for document in ids.split(lengths, dim=1)], 1)
    assert error(lm(ids, seq_idx=seq_idx).logits, apart) < 1e-5
    assert error(lm(ids).logits, apart) > 1e-2


def test_bf16_is_close_to_fp32(lm, form, ids, error):
    reference = lm(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert error(lm(ids).logits.float(), reference) < 0.03
    if form != "dense":
        return
    lm.bfloat16()
    assert error(lm(ids).logits.float(), reference) < 0.03
    _, state = lm.prefill(ids[:, :-1], lm.init_state(2))
    assert error(lm.step(ids[:, -1], state)[0].float(), reference[:, -1]) < 0.03


def test_it_generates(lm, ids):
    greedy = generate(lm, ids, 4, temperature=0)
    for position in range(21, 25):
        assert torch.equal(greedy[:, position], lm(greedy[:, :position]).logits[:, -1].argmax(-1))


def test_each_block_has_the_mixer_asked_for(make):
    lm = make(mixer=["mamba", "mamba2"], d_state=None)
    mixers = [layer.mixer for layer in lm.backbone.layers]
    assert [type(mixer) for mixer in mixers] == [Mamba1, Mamba2]
    assert [mixer.d_state for mixer in mixers] == [16, 128]


def test_both_projections_of_either_kind_become_binary_and_packed(make, ids, error):
    lm = binarize_(make(mixer=["mamba", "mamba2"]), ScaledSign)
    binary = {name for name, layer in lm.named_modules() if isinstance(layer, BinaryLinear)}
    assert binary == {f"backbone.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj", "out_proj")}
    logits = lm(ids).logits
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())
    pack_(lm)
    assert {name for name, layer in lm.named_modules() if isinstance(layer, PackedLinear)} == binary
    assert error(lm(ids).logits, logits) < 1e-5


def test_the_inner_projections_become_binary_when_named(make, ids, error):
    lm = binarize_(make(mixer="mamba"), FBI, targets=["x_proj", "dt_proj"])
    logits = lm(ids).logits
    assert error(pack_(lm)(ids).logits, logits) < 1e-5
    _, state = lm.prefill(ids[:, :-1], lm.init_state(2))
    assert error(lm.step(ids[:, -1], state)[0], logits[:, -1]) < 1e-5


def test_every_part_is_counted_once(make):
    lm = make(mixer="mamba", dt_rank=3)
    projections = 2 * (32 * 128 + 64 * 32)
    rest = 64 * 32 + 2 * (64 * 5 + 64 * (3 + 16) + 3 * 64 + 64 + 64 * 8 + 64) + 3 * 32
    assert count_parameters(lm) == (projections + rest, 0)
    binarize_(lm, FBI)
    scales = 2 * 2 * (32 + 64)
    before = count_parameters(lm), true_bits(lm)
    assert before == ((projections + rest + scales, projections), projections + 16 * (rest + scales))
    pack_(lm)
    assert (count_parameters(lm), true_bits(lm)) == before


def test_a_mixed_model_counts_what_its_layers_do(make):
    parts = [count_parameters(binarize_(make(mixer=mixer, n_layer=2), FBI)) for mixer in ("mamba", "mamba2")]
    mixed = count_parameters(binarize_(make(mixer=["mamba", "mamba2"]), FBI))
    assert mixed.binarized == sum(part.binarized for part in parts) / 2
    assert mixed.total == sum(part.total for part in parts) / 2


def test_it_is_saved_and_loaded(lm, ids, tmp_path):
    lm.save_pretrained(tmp_path)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert loaded.config == lm.config
    torch.testing.assert_close(loaded(ids).logits, lm(ids).logits)


def test_initial_values():
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=256, n_layer=4, vocab_size=64, d_state=8, mixer="mamba"))
    mixers = [layer.mixer for layer in lm.backbone.layers]
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9).expand(512, 8))
        assert bool((mixer.D == 1).all())
    dt = torch.cat([softplus(mixer.dt_proj.bias.detach().double()) for mixer in mixers])
    assert 1e-3 * 0.999 < dt.min() and dt.max() < 1e-1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.15)
    for name, bound in (
        ("dt_proj.weight", 16**-0.5),
        ("in_proj.weight", 256**-0.5),
        ("x_proj.weight", 512**-0.5),
        ("out_proj.weight", 512**-0.5 / 2),
        ("conv1d.weight", 4**-0.5),
    ):
        values = torch.cat([mixer.get_parameter(name).detach().flatten() for mixer in mixers])
        assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    marked = {
        name
        for name, parameter in lm.backbone.layers[0].mixer.named_parameters()
        if getattr(parameter, "_no_weight_decay", False)
    }
    assert marked == {"A_log", "D", "dt_proj.bias"}


def test_parameter_names_and_shapes_are_those_of_mamba_ssm():
    with torch.device("meta"):
        lm = MambaLM(MambaConfig(d_model=40, n_layer=1, vocab_size=61, d_conv=3, mixer="mamba"))
    mixer = lm.backbone.layers[0].mixer
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == {
        "in_proj.weight": (160, 40),
        "conv1d.weight": (80, 1, 3),
        "conv1d.bias": (80,),
        "x_proj.weight": (3 + 2 * 16, 80),
        "dt_proj.weight": (80, 3),
        "dt_proj.bias": (80,),
        "A_log": (80, 16),
        "D": (80,),
        "out_proj.weight": (40, 80),
    }


def name_there(name):
    """Return transformers' name of one of our parameters."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def pair_of_models(tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=3, vocab_size=96, state_size=8, tie_word_embeddings=tied
    )
    theirs = transformers.MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    shape = {"d_model": 64, "n_layer": 3, "vocab_size": 96, "d_state": 8, "mixer": "mamba", "tie_embeddings": tied}
    ours = MambaLM(MambaConfig(**shape))
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[name_there(name)] for name in ours.state_dict()})
    return ours, theirs.train()


@pytest.mark.parametrize(("padding", "tied"), [(None, True), ("left", False), ("right", True)])
def test_logits_and_every_gradient_are_those_of_transformers(padding, tied, error):
    ours, theirs = pair_of_models(tied)
    ids = torch.randint(96, (2, 45))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(0, 9) if padding == "left" else slice(36, 45)] = 0
    weight = torch.randn(2, 45, 96) * mask[..., None]
    results = []
    for model in (ours, theirs):
        logits = model(input_ids=ids, attention_mask=None if padding is None else mask).logits
        (logits * weight).sum().backward()
        results.append(logits.detach()[mask.bool()])
    assert error(*results) < 1e-5
    expected = dict(theirs.named_parameters())
    assert {name_there(name) for name, _ in ours.named_parameters()} == expected.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert error(parameter.grad, expected[name_there(name)].grad) < 1e-4, name
