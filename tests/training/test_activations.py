import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_
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
