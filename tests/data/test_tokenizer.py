from pathlib import Path
from typing import Any

import pytest
import torch

from bimamba_lit.data import tokenizer as tokenizer_module
from bimamba_lit.data.tokenizer import ByteTokenizer, SubwordTokenizer, load_tokenizer, tokenizer_from_json
from bimamba_lit.errors import UserError

MIXED = "Größe 中文 🎉👩‍🚀\r\n  end \n"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Path) -> ByteTokenizer | SubwordTokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe))


def test_round_trip_of_text_and_of_the_tokenizer(tokenizer: ByteTokenizer | SubwordTokenizer) -> None:
    ids = tokenizer.encode(MIXED)
    assert tokenizer.decode(ids) == MIXED
    again = tokenizer_from_json(tokenizer.to_json())
    assert type(again) is type(tokenizer)
    assert again.encode(MIXED) == ids
    assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
    assert [i.tolist() for i in tokenizer.encode_batch([MIXED, "", "a"])] == [ids, [], tokenizer.encode("a")]


def test_sizes_are_those_of_the_text_up_to_each_token(tokenizer: ByteTokenizer | SubwordTokenizer) -> None:
    texts = [MIXED, "", "🎉"]
    all_ids, all_sizes = tokenizer.encode_sizes(texts)
    for text, ids, sizes in zip(texts, all_ids, all_sizes, strict=True):
        assert ids.tolist() == tokenizer.encode(text)
        assert sizes.sum() == len(text.encode())
        assert (sizes >= 0).all()
    # Where a token ends on a character, decoding the tokens so far gives as many bytes as were counted.
    ids, sizes = all_ids[0], all_sizes[0]
    whole = [k for k in range(len(ids) + 1) if MIXED.startswith(tokenizer.decode(ids[:k].tolist()))]
    assert len(whole) > 10
    if isinstance(tokenizer, SubwordTokenizer):
        assert [sizes[:k].sum() for k in whole] == [len(tokenizer.decode(ids[:k].tolist()).encode()) for k in whole]


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é\r\n") == [0xC3, 0xA9, 13, 10]
    assert tokenizer.decode([97, 256, 0xC3, 98]) == "a\ufffdb"


def test_no_special_token_truncation_or_padding(bpe: Path) -> None:
    tokenizer = load_tokenizer(str(bpe))
    assert tokenizer.separator == 1
    assert tokenizer.vocab_size == 360
    spelled = tokenizer.encode("a <|endoftext|>")
    assert 1 not in spelled
    assert tokenizer.decode(spelled) == "a <|endoftext|>"
    assert len(tokenizer.encode(MIXED)) > 5
    assert tokenizer.encode("") == []


def test_vocab_size_covers_the_highest_id() -> None:
    from tokenizers import Tokenizer, models

    assert SubwordTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).to_str()).vocab_size == 8


def test_a_tokenizer_that_marks_the_beginning_of_a_text_is_not_given_pieces(bpe: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    assert load_tokenizer(str(bpe)).splits_at_words()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz")], 0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not SubwordTokenizer(unigram.to_str()).splits_at_words()
    marked = Tokenizer.from_file(str(bpe))
    marked.normalizer = normalizers.Prepend("a")
    assert not SubwordTokenizer(marked.to_str()).splits_at_words()


def test_a_space_belongs_to_the_token_that_ends_with_it() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "aĠ": 3}, [("a", "Ġ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    (ids,), (sizes,) = SubwordTokenizer(bpe.to_str()).encode_sizes(["a ba a b"])
    assert ids.tolist() == [3, 1, 3, 3, 1]
    assert sizes.tolist() == [2, 1, 2, 2, 1]


def test_text_that_a_normalizer_drops_is_still_counted() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.normalizer = normalizers.Strip()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, sizes = SubwordTokenizer(words.to_str()).encode_sizes(["  a é\n\n b  \n"])
    assert ids[0].tolist() == [0, 2, 1]
    assert sizes[0].tolist() == [3, 3, 7]


def test_ends_that_fall_back_count_no_character_twice() -> None:
    assert tokenizer_module._sizes("aé中b", [1, 3, 2, 3, 4]).tolist() == [1, 5, 0, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param("1" * 5000, "not JSON", id="digits"),
        ("[1]", "no 'model' key"),
        ('{"model": {"type": "BPE"}}', "does not accept"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match=message):
        tokenizer_from_json(content)


def test_a_run_gives_its_tokenizer(tiny: Any, bpe: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(tiny.teacher)).to_json() == ByteTokenizer().to_json()
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    torch.save({"lm": {}, "state_dict": {}, "tokenizer": bpe.read_text()}, last)
    assert load_tokenizer(str(tmp_path)).encode("text") == load_tokenizer(str(bpe)).encode("text")
    torch.save({"lm": {}, "state_dict": {}, "tokenizer": None}, last)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"neither 'bytes' nor .*did you mean 'tokenizer.json'"):
        load_tokenizer(str(tmp_path / "tokeniser.json"))
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json as UTF-8"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        load_tokenizer("byte")
    with pytest.raises(UserError, match="cannot read .*UTF-8"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
