import pytest
import torch

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.data.tokenizer import load_tokenizer
from bimamba_lit.distill import find_checkpoint, load_teacher
from bimamba_lit.errors import UserError
from bimamba_lit.export.transformers_folder import export_transformers
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json


def test_a_teacher_loads_from_wherever_it_lies(tiny, tmp_path):
    last = tiny.teacher / "checkpoints" / "last.ckpt"
    load_lm(last).save_pretrained(tmp_path / "saved")
    ids = torch.arange(9)[None]
    expected = load_lm(last).requires_grad_(False)(ids).logits
    for path in (tiny.teacher, str(last), tmp_path / "saved"):
        teacher = load_teacher(path, 257, load_tokenizer("bytes").to_json())
        assert torch.equal(teacher(ids).logits, expected)
        assert not teacher.training and not any(one.requires_grad for one in teacher.parameters())


def test_a_teacher_must_read_the_same_text(tiny):
    with pytest.raises(UserError, match="has a vocabulary of 257 tokens but the data's tokenizer has 300"):
        load_teacher(tiny.teacher, 300)
    other = load_tokenizer_json(tiny.teacher / "checkpoints" / "last.ckpt") + " "
    with pytest.raises(UserError, match="another tokenizer"):
        load_teacher(tiny.teacher, 257, other)


def test_only_rows_that_can_be_padding_are_cut_off_a_teacher_of_another_program(tmp_path):
    lm = MambaLM(MambaConfig(d_model=16, n_layer=1, headdim=8, d_state=8, vocab_size=600))
    export_transformers(lm, tmp_path / "theirs", None, dtype="float32")
    ids = torch.arange(9)[None]
    teacher = load_teacher(tmp_path / "theirs", 345)
    assert teacher.config.vocab_size == 345
    assert torch.allclose(teacher(ids).logits, lm(ids).logits[..., :345], atol=1e-6)
    for tokens in (344, 601):
        with pytest.raises(UserError, match=f"has a vocabulary of 600 tokens but the data's tokenizer has {tokens}"):
            load_teacher(tmp_path / "theirs", tokens)
    lm.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="has a vocabulary of 600 tokens"):
        load_teacher(tmp_path / "ours", 599)


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / "other") == tmp_path / "other"
