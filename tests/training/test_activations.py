import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, Unfinished, binarize_
from bimamba_lit.training.activations import checkpoint_blocks_, compile_blocks_


def test_checkpointed_blocks_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=17, d_model=16, n_layer=2, headdim=8, d_state=8, chunk_size=4)
    plain = binarize_(MambaLM(config), FBI)
    saving = binarize_(MambaLM(config), FBI)
    saving.load_state_dict(plain.state_dict())
    checkpoint_blocks_(saving)
    assert saving.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, 17, (2, 9))
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    kept, losses = [], []
    for lm in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=kept: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = lm(ids, seq_idx=documents).logits.square().mean()
        losses.append((loss, sum(kept)))
        kept.clear()
        loss.backward()
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] < losses[0][1]
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, saving.get_parameter(name).grad), name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile looks at whatever is there, warnings or not
def test_compiled_blocks_have_the_same_names_loss_and_gradients():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=17, d_model=16, n_layer=1, headdim=8, d_state=8, chunk_size=4)
    plain, compiled = (binarize_(MambaLM(config), FBI) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    compile_blocks_(compiled, backend="aot_eager")
    checkpoint_blocks_(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, 17, (2, 9))
    losses = [lm(ids).logits.square().mean() for lm in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_blocks_of_the_best_recipe_stay_compiled_from_its_first_step_to_its_end():
    config = MambaConfig(d_model=128, n_layer=4, vocab_size=61, headdim=16, d_state=8, chunk_size=8)
    lm = binarize_(MambaLM(config), FBI, double_inputs={"in_proj": [0.25, 0, 0, 0], "out_proj": [1, 0]})
    torch._dynamo.reset()
    ids = torch.arange(24).reshape(2, 12)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_blocks_(lm, backend="eager")
        for share in (0.0, 0.25, 0.5, None):
            for layer in lm.modules():
                if isinstance(layer, FBI):
                    layer.unfinished = None if share is None else Unfinished("tanh", share)
            lm.train()(ids).logits.sum().backward()
            with torch.no_grad():
                lm.eval()(ids)
