import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM, ops
from bimamba_lit.binarize import FBI, binarize_, pack_
from bimamba_lit.errors import UserError
from bimamba_lit.models.state import MambaState


@pytest.fixture
def ids():
    return torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["dense", "latent", "packed"])
def lm(request, make):
    lm = make(ngroups=2)
    if request.param != "dense":
        binarize_(lm, FBI)
    if request.param == "packed":
        pack_(lm)
    return lm


@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_in_mixed_precision_a_block_gives_its_mixer_what_it_would_round_to(mixer, make):
    """Output and gradients are, bit for bit, those of a norm that writes fp32."""
    block = binarize_(make(mixer=mixer), FBI).backbone.layers[0]
    x = torch.randn(2, 21, block.norm.weight.numel(), requires_grad=True)
    leaves = [x, *block.parameters()]

    def run(forward):
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    right = run(lambda x: x + block.mixer(block.norm(x)))
    assert all(torch.equal(a, b) for a, b in zip(run(block), right, strict=True))


@pytest.mark.parametrize("pieces", [[21], [1, 20], [8, 1, 2, 10]])
def test_prefill_in_pieces_equals_the_full_forward(lm, ids, pieces, error):
    state, logits = lm.init_state(2), []
    for piece in ids.split(pieces, dim=1):
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
    lm = make(ngroups=2).double()
    state, logits = lm.init_state(2), []
    for token in ids.unbind(1):
        step, state = lm.step(token, state)
        logits.append(step)
    assert error(torch.stack(logits, 1), lm(ids).logits) < 1e-12, "something is rounded to single precision"


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


def test_a_state_of_another_batch_is_refused(make, ids):
    with pytest.raises(UserError, match="state is for a batch of 3 sequences and the tokens are of 2"):
        make().prefill(ids, make().init_state(3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_changes_nothing(lm, ids, side, dtype, error):
    pad = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    kept = slice(6, None) if side == "left" else slice(0, 21)
    mask = torch.zeros_like(padded, dtype=dtype)
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


def test_the_backbone_and_the_head_are_the_model(make, ids):
    lm = make()
    hidden = lm.backbone(ids)
    assert hidden.shape == (2, 21, 32)
    assert lm.head_weight.shape == (61, 32)
    torch.testing.assert_close(hidden @ lm.head_weight.T, lm(ids).logits)


def test_logits_have_the_vocabulary_whatever_the_padding_of_the_table(make, ids):
    lm = make()
    assert lm.backbone.embedding.weight.shape[0] == 64
    assert lm(ids).logits.shape == (2, 21, 61)
    assert lm.prefill(ids, lm.init_state(2))[0].shape == (2, 21, 61)
    assert lm.step(ids[:, 0], lm.init_state(2))[0].shape == (2, 61)
    lm(ids).logits.logsumexp(-1).sum().backward()
    assert not lm.backbone.embedding.weight.grad[61:].any()


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(make):
    tied, untied = make(), make(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 64 * 32


def test_bf16_autocast_is_close_to_fp32(lm, ids, error):
    with torch.autocast("cpu", torch.bfloat16):
        logits = lm(ids).logits
    assert error(logits.float(), lm(ids).logits) < 0.03


def test_under_autocast_the_scan_reads_bf16_with_steps_and_decays_in_fp32(make, ids, monkeypatch):
    seen, mix = [], ops.conv_ssd_norm

    def spy(projected, conv_weight, conv_bias, A, D, dt_bias, *rest):
        seen.append([tensor.dtype for tensor in (projected, A, dt_bias)])
        return mix(projected, conv_weight, conv_bias, A, D, dt_bias, *rest)

    monkeypatch.setattr(ops, "conv_ssd_norm", spy)
    with torch.autocast("cpu", torch.bfloat16):
        make()(ids)
    assert seen == [[torch.bfloat16, torch.float32, torch.float32]] * 2


def test_bf16_weights_keep_the_residual_in_fp32(make, ids, error):
    lm = make()
    reference = lm(ids).logits
    seen = []
    lm.backbone.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert error(lm.bfloat16()(ids).logits.float(), reference) < 0.03
    lm.backbone.residual_in_fp32 = False
    lm(ids)
    assert seen == [torch.float32, torch.bfloat16]


def test_a_step_in_bf16_is_close_to_fp32(make, ids, error):
    lm = make()
    reference = lm(ids).logits[:, -1]
    lm.bfloat16()
    state = lm.init_state(2)
    assert {part.dtype for layer in state.layers for part in layer} == {torch.bfloat16, torch.float32}
    _, state = lm.prefill(ids[:, :-1], state)
    assert error(lm.step(ids[:, -1], state)[0].float(), reference) < 0.03


def test_it_builds_on_the_meta_device():
    with torch.device("meta"):
        lm = MambaLM(MambaConfig(d_model=2560, n_layer=64, vocab_size=50288))
    assert all(tensor.is_meta for tensor in lm.state_dict().values())
    assert lm.lm_head.weight is lm.backbone.embedding.weight
    assert lm.device.type == "meta"


@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_it_runs_on_the_meta_device_forward_and_backward(mixer):
    """As Lightning's ``measure_flops`` counts what a step computes."""
    with torch.device("meta"):
        lm = binarize_(MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=50, headdim=32, mixer=mixer)), FBI)
        ids = torch.zeros(2, 8, dtype=torch.int64)
    logits = lm(ids).logits
    logits.sum().backward()
    assert logits.shape == (2, 8, 50) and all(parameter.grad is not None for parameter in lm.parameters())
    assert lm.eval().step(ids[:, 0], lm.init_state(2))[0].shape == (2, 50)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(2, 3), "must be integers (torch.int64), not torch.float32"),
        (torch.zeros(3, dtype=torch.int64), "must have the shape (batch, length), not (3,)"),
        (torch.zeros(2, 0, dtype=torch.int64), "no tokens to read: token ids have the shape (2, 0)"),
        (torch.tensor([[3, 61]]), "token id 61 is outside the model's vocabulary, 0 to 60"),
        (torch.tensor([[-100, 60]]), "token id -100 is outside"),
    ],
)
def test_bad_tokens_are_refused(make, bad, words):
    lm = make()
    for call in (lambda: lm(bad), lambda: lm.prefill(bad, lm.init_state(2))):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)


def test_bad_tokens_of_a_step_are_refused(make):
    lm = make()
    with pytest.raises(UserError, match=r"must have the shape \(batch,\), not \(2, 1\)"):
        lm.step(torch.zeros(2, 1, dtype=torch.int64), lm.init_state(2))


def test_a_state_of_another_model_is_refused(make):
    lm, ids = make(), torch.zeros(2, 3, dtype=torch.int64)
    state = MambaState(lm.init_state(2).layers[:1])
    for call in (lambda: lm.prefill(ids, state), lambda: lm.step(ids[:, 0], state)):
        with pytest.raises(UserError, match="the state is of 1 blocks and the model has 2"):
            call()


def test_document_numbers_that_are_no_integers_are_refused(make, ids):
    with pytest.raises(UserError, match=r"seq_idx must be integers \(torch.int32\), not torch.float32"):
        make()(ids, seq_idx=torch.rand(ids.shape))


@pytest.mark.parametrize("name", ["attention_mask", "seq_idx"])
def test_a_mask_of_another_shape_is_refused(make, ids, name):
    with pytest.raises(UserError, match=rf"{name} must have the shape of input_ids, \(2, 21\), not \(2, 20\)"):
        make()(ids, **{name: torch.ones(2, 20, dtype=torch.int64)})
