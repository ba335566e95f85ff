import hashlib
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from bimamba_lit.data import tokens
from bimamba_lit.data.sources import Span
from bimamba_lit.data.tokenizer import ByteTokenizer, load_tokenizer
from bimamba_lit.data.tokens import NOT_A_TARGET, TokenStream, token_stream
from bimamba_lit.errors import UserError


@pytest.fixture
def spans(texts: Path) -> list[Span]:
    return [Span(path) for path in sorted(texts.iterdir())]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_documents_joined_by_separators(spans: list[Span], tmp_path: Path, bpe: Path, kind: str) -> None:
    tokenizer = load_tokenizer(kind if kind == "bytes" else str(bpe))
    contents = [span.path.read_bytes() for span in spans]
    expected: list[int] = []
    first: list[int] = []
    for content in contents:
        expected += [tokenizer.separator] if expected else []
        first.append(len(expected))
        expected += tokenizer.encode(content.decode())
    stream = token_stream(spans, tokenizer, tmp_path / "cache", sized=True)
    assert stream.tokens.tolist() == expected
    assert stream.tokens.dtype == np.uint16
    uncounted = [i for i, id in enumerate(expected) if id == tokenizer.separator or i in first]
    assert np.flatnonzero(stream.sizes == NOT_A_TARGET).tolist() == uncounted
    assert stream.documents == len(contents)
    assert stream.text_tokens == len(expected) - len(contents) + 1
    assert stream.text_bytes == sum(map(len, contents))
    assert stream.sha256 == hashlib.sha256(b"".join(contents)).hexdigest()
    plain = token_stream(spans, tokenizer, tmp_path / "cache")
    assert plain.tokens.tolist() == expected


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_is_cut_after_some_tokens(spans: list[Span], tmp_path: Path, bpe: Path, kind: str) -> None:
    tokenizer = load_tokenizer(kind if kind == "bytes" else str(bpe))
    whole = token_stream(spans, tokenizer, tmp_path, sized=True)
    text = b"".join(span.path.read_bytes() for span in spans)
    for limit in (2, 17, 50, 60, whole.text_tokens - 1):
        cut = token_stream(spans, tokenizer, tmp_path, sized=True, max_tokens=limit)
        assert cut.text_tokens == limit
        assert cut.tokens.tolist() == whole.tokens[: cut.length].tolist()
        assert cut.sizes.tolist() == whole.sizes[: cut.length].tolist()
        assert cut.sha256 == hashlib.sha256(text[: cut.text_bytes]).hexdigest()
        if kind == "bytes":
            assert cut.text_bytes == limit
    assert token_stream(spans, tokenizer, tmp_path, sized=True, max_tokens=10**9).sha256 == whole.sha256


def test_a_second_call_reads_the_cache(spans: list[Span], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = token_stream(spans, ByteTokenizer(), tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(tokens, "_make")
        assert token_stream(spans, ByteTokenizer(), tmp_path) == made
    spans[0].path.write_bytes(b"other text")
    assert token_stream(spans, ByteTokenizer(), tmp_path) != made


@pytest.mark.parametrize("name", ["tokens.bin", "sizes.bin", "stream.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_cut_off_stream_is_made_anew(spans: list[Span], tmp_path: Path, name: str, damage: str) -> None:
    made = token_stream(spans, ByteTokenizer(), tmp_path, sized=True)
    ids, sizes = made.tokens.tolist(), made.sizes.tolist()
    path = made.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[:-3])
    (made.folder / f".{name}.abandoned").touch()
    again = token_stream(spans, ByteTokenizer(), tmp_path, sized=True)
    assert (again.tokens.tolist(), again.sizes.tolist()) == (ids, sizes)
    assert not (made.folder / f".{name}.abandoned").exists()


def test_nothing_is_left_of_a_text_that_fails(spans: list[Span], tmp_path: Path) -> None:
    spans[-1].path.write_bytes(b"\xff")
    for _ in range(2):
        with pytest.raises(UserError, match="byte 0 cannot be decoded"):
            token_stream(spans, ByteTokenizer(), tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def _make_slowly(start: object, spans: list[Span], cache: Path, results: object) -> None:
    made = []
    original = tokens._make

    def counting(*arguments: object) -> TokenStream:
        made.append(1)
        return original(*arguments)

    tokens._make = counting
    start.wait()
    stream = token_stream(spans, ByteTokenizer(), cache)
    results.put((len(made), stream.tokens.tolist()))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_processes_that_want_the_same_wait_for_one(spans: list[Span], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_make_slowly, args=(start, spans, tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(made for made, _ in answers) == [0, 0, 1]
    assert all(ids == answers[0][1] for _, ids in answers)


def test_a_stream_travels_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 50_000)
    stream = token_stream([Span(path)], ByteTokenizer(), tmp_path / "cache")
    assert stream.tokens[:2].tolist() == [119, 111]
    packed = pickle.dumps(stream)
    assert len(packed) < 2000
    assert pickle.loads(packed).tokens.tolist() == stream.tokens.tolist()


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        separator = 69_999

        def to_json(self) -> str:
            return "wide"

    for name in "ab":
        (tmp_path / name).write_text(name)
    stream = token_stream([Span(tmp_path / "a"), Span(tmp_path / "b")], Wide(), tmp_path / "cache")
    assert stream.tokens.tolist() == [97, 69_999, 98]


def test_a_cache_that_cannot_be_written(spans: list[Span], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the token cache .*set HF_DATASETS_CACHE .* or cache_dir"):
        token_stream(spans, ByteTokenizer(), tmp_path / "file")
