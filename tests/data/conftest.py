import json
from pathlib import Path

import pytest

# Multi-byte characters of every length, line ends of both kinds, runs of spaces, no newline at the end.
TEXTS = (
    "Emoji 🎉🎉 und Größe,\r\n\r\n  zwei Wörter\n",
    "中文句子。 another line\n\n\n    indented 👩‍🚀 text \t end\n" * 30,
    "x",
    "The last one: naïve façade, 漢字 and <|endoftext|> spelled out",
)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that would add special tokens, truncate and pad if it were used as its file says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    assert json.loads(path.read_text())["truncation"]
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with `TEXTS`, a document a file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    return folder
