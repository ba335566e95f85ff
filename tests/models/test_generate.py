import pytest
import torch

from bimamba_lit.errors import UserError
from bimamba_lit.models import generate as module
from bimamba_lit.models.generate import generate


@pytest.fixture
def ids():
    return torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("piece", [2048, 3])
def test_greedy_is_the_argmax_of_the_full_forward(make, ids, monkeypatch, piece):
    monkeypatch.setattr(module, "_PREFILL_TOKENS", piece)
    lm, expected = make(), ids
    for _ in range(9):
        expected = torch.cat([expected, lm(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(lm, ids, 9, temperature=0), expected)


def test_a_seed_fixes_the_tokens(make, ids):
    lm = make()
    first = generate(lm, ids, 12, generator=seeded(3))
    assert torch.equal(generate(lm, ids, 12, generator=seeded(3)), first)
    assert not torch.equal(generate(lm, ids, 12, generator=seeded(4)), first)
    torch.manual_seed(5)
    default = generate(lm, ids, 12)
    torch.manual_seed(5)
    assert torch.equal(generate(lm, ids, 12), default)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_are_drawn_from_the_tempered_softmax(make, temperature):
    lm, draws = make(), 3000
    prompt = torch.tensor([[5, 9]])
    logits = lm(prompt).logits[0, -1].detach() * 3
    lm.backbone.norm_f.weight.data *= 3  # far from uniform
    drawn = generate(lm, prompt.expand(draws, -1), 1, temperature, seeded(0))[:, -1]
    expected = torch.softmax(logits / temperature, -1) * draws
    counts = torch.bincount(drawn, minlength=61).float()
    often = expected > 20
    assert often.sum() > 5
    assert bool(((counts - expected).abs() < 4.5 * expected.sqrt())[often].all())


def test_the_prompt_stays_and_the_length_is_as_asked(make, ids):
    out = generate(make(), ids, 4, generator=seeded(0))
    assert out.shape == (2, 11) and out.dtype == torch.int64
    assert torch.equal(out[:, :7], ids)
    assert torch.equal(generate(make(), ids, 0), ids)


def test_it_leaves_the_model_in_its_mode_and_fit_to_train(make, ids):
    lm = make().train()
    lm.backbone.layers[1].eval()
    modes = [part.training for part in lm.modules()]
    out = generate(lm, ids, 2, generator=seeded(0))
    assert [part.training for part in lm.modules()] == modes
    lm(out).logits.sum().backward()  # fails on tensors of inference mode
    assert lm.backbone.embedding.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, not -1"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature must be 0"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature must be 0"),
    ],
)
def test_bad_options_are_refused(make, ids, options, words):
    with pytest.raises(UserError, match=words):
        generate(make(), ids, **options)


def test_a_prompt_without_a_batch_is_refused(make, ids):
    with pytest.raises(UserError, match=r"prompts must have the shape \(batch, length\), not \(\d+,\)"):
        generate(make(), ids[0], 2)


def test_a_model_that_diverged_is_told(make, ids):
    lm = make()
    lm.backbone.norm_f.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        generate(lm, ids, 1)
