import pytest

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.data import ByteTokenizer, tokenizer_from_json
from bimamba_lit.errors import UserError
from bimamba_lit.eval.continue_text import continue_text
from bimamba_lit.models.checkpoint import load_lm, load_tokenizer_json


def test_a_text_goes_on_the_same_from_a_run_a_checkpoint_and_a_saved_folder(tiny, tmp_path):
    last = tiny.teacher / "checkpoints" / "last.ckpt"
    load_lm(last).save_pretrained(tmp_path / "saved", tokenizer=load_tokenizer_json(last))
    texts = {continue_text(path, "The quick", 20, 0.8, 3) for path in (tiny.teacher, last, tmp_path / "saved")}
    assert len(texts) == 1
    (text,) = texts
    assert text.startswith("The quick") and len(text) > len("The quick")


def test_the_seed_decides(tiny):
    assert continue_text(tiny.teacher, "a", 20, 1.0, 0) == continue_text(tiny.teacher, "a", 20, 1.0, 0)
    assert continue_text(tiny.teacher, "a", 20, 1.0, 0) != continue_text(tiny.teacher, "a", 20, 1.0, 1)


def test_no_temperature_takes_the_likeliest_token(tiny):
    lm = load_lm(tiny.teacher / "checkpoints" / "last.ckpt")
    tokenizer = tokenizer_from_json(load_tokenizer_json(tiny.teacher / "checkpoints" / "last.ckpt"))
    import torch

    ids = tokenizer.encode("fox")
    for _ in range(5):
        ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
    assert continue_text(tiny.teacher, "fox", 5, 0.0, 0) == tokenizer.decode(ids)


def test_what_cannot_be_continued_is_told(tiny, tmp_path):
    with pytest.raises(UserError, match="the prompt is empty"):
        continue_text(tiny.teacher, "", 5, 1.0, 0)
    load_lm(tiny.teacher / "checkpoints" / "last.ckpt").save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="has no tokenizer"):
        continue_text(tmp_path / "saved", "a", 5, 1.0, 0)
    small = MambaLM(MambaConfig(d_model=16, n_layer=1, headdim=8, d_state=8, vocab_size=256))
    small.save_pretrained(tmp_path / "small", tokenizer=ByteTokenizer().to_json())
    with pytest.raises(UserError, match="the tokenizer has 257 tokens and the model .*small knows 256"):
        continue_text(tmp_path / "small", "a", 5, 1.0, 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        continue_text(tmp_path / "run", "a", 5, 1.0, 0)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="runs holds no model"):
        continue_text(tmp_path / "runs", "a", 5, 1.0, 0)


def test_a_seed_that_no_generator_takes_is_told(tiny):
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(
            UserError, match=f"seed: {seed} is out of range, it must be -9223372036854775808 to 18446744073709551615"
        ):
            continue_text(tiny.teacher, "a", 5, 1.0, seed)
