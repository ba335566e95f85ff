"""Text for language models: a Lightning data module, its tokenizers and the offline corpus."""

from bimamba_lit.data.module import TextDataModule
from bimamba_lit.data.offline import offline_corpus
from bimamba_lit.data.source import Source
from bimamba_lit.data.tokenizer import ByteTokenizer, tokenizer_from_json

__all__ = ["ByteTokenizer", "Source", "TextDataModule", "offline_corpus", "tokenizer_from_json"]
