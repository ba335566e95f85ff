"""Teachers of other kinds: transformers' causal language models, padded tables, tokenizers written in another way."""

import json

import pytest
import torch

from bimamba_lit.data.tokenizer import load_tokenizer
from bimamba_lit.distill import CausalTeacher, load_teacher
from bimamba_lit.errors import UserError

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MAKE = {
    "llama": lambda v: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=v, initializer_range=0.3)
    ),
    "gpt_neox": lambda v: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES, vocab_size=v, initializer_range=0.3)
    ),
}


@pytest.fixture(scope="module", params=MAKE)
def teacher_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MAKE[request.param](264).save_pretrained(folder)
    return folder


def test_head_times_backbone_are_its_logits(teacher_folder):
    teacher = load_teacher(teacher_folder, 264)
    assert isinstance(teacher, CausalTeacher) and not any(p.requires_grad for p in teacher.parameters())
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    ids = torch.randint(264, (2, 9))
    found = teacher.backbone(ids) @ teacher.head_weight.t()
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other(teacher_folder):
    teacher = load_teacher(teacher_folder)
    ids = torch.randint(264, (2, 10))
    seq_idx = torch.tensor([[0] * 4 + [1] * 6, [3] * 7 + [0] * 1 + [3] * 2], dtype=torch.int32)
    together = teacher.backbone(ids, seq_idx=seq_idx)
    for row, spans in enumerate([[(0, 4), (4, 10)], [(0, 7), (7, 8), (8, 10)]]):
        for start, stop in spans:
            alone = teacher.backbone(ids[row : row + 1, start:stop])[0]
            torch.testing.assert_close(together[row, start:stop], alone, rtol=1e-4, atol=1e-5)


def test_a_padded_table_is_cut_to_the_datas_vocabulary(teacher_folder, tmp_path):
    ids = torch.randint(257, (1, 6))
    teacher = load_teacher(teacher_folder, 257)
    assert teacher.head_weight.shape[0] == teacher.config.vocab_size == 257
    config = transformers.Mamba2Config(
        hidden_size=16, num_hidden_layers=1, vocab_size=264, head_dim=8, num_heads=4, state_size=4, n_groups=1
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    full, mamba = load_teacher(tmp_path, 264), load_teacher(tmp_path, 257)
    assert mamba.head_weight.shape[0] == 257
    assert torch.equal(mamba(ids).logits, full(ids).logits[..., :257])
    with pytest.raises(UserError, match="vocabulary of 264 tokens but the data's tokenizer has 300"):
        load_teacher(tmp_path, 300)
    with pytest.raises(UserError, match="vocabulary of 264 tokens but the data's tokenizer has 8"):
        load_teacher(tmp_path, 8)


def test_a_sliding_window_stays_where_documents_are_kept_apart(tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SIZES, num_key_value_heads=1, vocab_size=30, sliding_window=3, initializer_range=0.3
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    ids = torch.randint(30, (1, 12))
    one_document = torch.zeros(1, 12, dtype=torch.int32)
    torch.testing.assert_close(teacher.backbone(ids, seq_idx=one_document), teacher.backbone(ids))
    two = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    torch.testing.assert_close(teacher.backbone(ids, seq_idx=two)[:, 5:], teacher.backbone(ids[:, 5:]))


def test_a_teacher_that_lacks_a_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    MAKE["llama"](30).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors of a LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"):
        load_teacher(tmp_path)


def tokenizer_text():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat " * 20], trainer)
    return tokenizer.to_str()


def test_tokenizers_are_compared_by_what_they_do(tmp_path):
    MAKE["llama"](264).save_pretrained(tmp_path)
    text = tokenizer_text()
    (tmp_path / "tokenizer.json").write_text(text)
    other_way = json.dumps(json.loads(text), indent=4)
    assert load_teacher(tmp_path, 264, other_way).config.vocab_size == 264
    definition = json.loads(text)
    words = definition["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_teacher(tmp_path, 264, json.dumps(definition))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_teacher(tmp_path, 264, load_tokenizer("bytes").to_json())


def test_what_cannot_teach_is_told_in_a_sentence(tmp_path, monkeypatch):
    def told(path):
        with pytest.raises(UserError) as error:
            load_teacher(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    assert "lacks 6 tensors of a BertLMHeadModel" in told(tmp_path / "bert")
    transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path / "phi")
    assert "a PhiForCausalLM, has no plain output head without bias" in told(tmp_path / "phi")
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=30)
    ).save_pretrained(tmp_path / "t5")
    assert "as a causal language model" in told(tmp_path / "t5")
    capped = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=1, head_dim=8, vocab_size=30, final_logit_softcapping=30.0
    )
    transformers.Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    assert "does more to its logits" in told(tmp_path / "capped")
    assert "there is no file or folder" in told(tmp_path / "nothing")
    MAKE["llama"](40).save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    next(iter(sorted((tmp_path / "shards").glob("model-*")))).unlink()
    assert "model-00001" in told(tmp_path / "shards")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "needs transformers: pip install" in told(tmp_path / "bert")
