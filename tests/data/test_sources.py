import bz2
import gzip
import lzma
from itertools import groupby
from pathlib import Path

import pytest

from bimamba_lit.data import sources
from bimamba_lit.data.source import as_sources
from bimamba_lit.data.sources import Span, digest, find_files, hold_out, pieces, size_of
from bimamba_lit.data.tokenizer import load_tokenizer
from bimamba_lit.errors import UserError

OPENERS = {".txt": open, ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def write(path: Path, data: bytes) -> Path:
    with OPENERS[path.suffix](path, "wb") as file:
        file.write(data)
    return path


def documents(spans: list[Span], document_end: str | None = None, whole: bool = False) -> list[str]:
    rows = pieces(spans, document_end, whole)
    return ["".join(row["text"] for row in group) for _, group in groupby(rows, lambda row: row["document"])]


def test_files_folders_and_patterns_in_order_and_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b, a = write(tmp_path / "b.txt", b"b"), write(tmp_path / "deep" / "a.txt", b"a")
    packed = write(tmp_path / "c.txt.xz", b"c")
    (tmp_path / "other.md").write_text("md")
    (tmp_path / "empty.txt").touch()
    write(tmp_path / "hollow.txt.gz", b"")
    assert find_files(str(tmp_path), "train") == [b, packed, a]
    assert find_files(str(tmp_path / "*.md"), "train") == [tmp_path / "other.md"]
    assert find_files(str(tmp_path / "**" / "*.txt"), "train") == [b, a]


@pytest.mark.parametrize("suffix", OPENERS)
def test_bytes_are_kept_as_they_are(tmp_path: Path, suffix: str) -> None:
    text = "\ufeffone\r\ntwo\rthree\n\n  中文 🎉\x0c\x1c no newline at the end"
    path = write(tmp_path / f"a{suffix}", text.encode())
    assert documents([Span(path)]) == [text]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("document_end", [None, "<|endoftext|>"])
def test_pieces_join_to_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool, document_end: str | None
) -> None:
    monkeypatch.setattr(sources, "_PIECE", 11)
    first = "Some wörds 中文。\nmore <|endoftext|> inside\r\n"
    body = first + "<|endoftext|>\r\n\n\nnext   one\n<|endoftext|>\n<|endoftext|>\nlast"
    path = write(tmp_path / "a.txt", body.encode())
    parts = [body] if document_end is None else [first, "\n\nnext   one\n", "last"]
    assert documents([Span(path), Span(path)], document_end, whole) == parts * 2
    count = len(list(pieces([Span(path)], document_end, whole)))
    assert count == len(parts) if whole else count > len(parts)
    for stop in range(1, len(body.encode())):
        try:
            expected = body.encode()[:stop].decode()
        except UnicodeDecodeError:
            continue
        assert "".join(documents([Span(path, 0, stop), Span(path, stop)])) == body
        assert documents([Span(path, 0, stop)]) == [expected]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_pieces_have_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Path, length: int
) -> None:
    monkeypatch.setattr(sources, "_PIECE", length)
    tokenizer = load_tokenizer(str(bpe))
    text = "a\n b  c\n\n    d word, Wörter 中文 字\nf's x9 12 3\tq\n\n\n   it's    end.     so  \n" * 9
    path = write(tmp_path / "a.txt", text.encode())
    parts = [row["text"] for row in pieces([Span(path)], None, False)]
    assert len(parts) > 30
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


@pytest.mark.parametrize("suffix", [".txt", ".xz"])
def test_the_tail_of_one_document_is_held_out_from_a_line_on(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"line {n} é\n" for n in range(100))
    kept, held = hold_out([write(tmp_path / f"a{suffix}", text.encode())])
    (train,), (val,) = documents(kept), documents(held)
    assert train + val == text
    assert val.startswith("line ")
    assert 0.03 < len(val) / len(text) <= 0.05


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n:02}.txt", f"document {n:02}\n".encode()) for n in range(40)]
    assert hold_out(files) == ([Span(f) for f in files[:38]], [Span(f) for f in files[38:]])


def test_a_text_of_one_line_is_cut_at_a_character(tmp_path: Path) -> None:
    kept, held = hold_out([write(tmp_path / "a.txt", ("🎉" * 50).encode())])
    assert documents(kept) == ["🎉" * 48]
    assert documents(held) == ["🎉" * 2]


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", b"same"), write(tmp_path / "b.txt", b"same")
    assert digest([Span(a)]) == digest([Span(b)])
    other = {digest([Span(a, 1)]), digest([Span(a, 0, 3)]), digest([Span(a), Span(b)]), digest([])}
    b.write_bytes(b"else")
    assert len(other | {digest([Span(a)]), digest([Span(b)])}) == 6


def test_size_is_known_only_without_decompressing(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", b"12345"), write(tmp_path / "b.xz", b"12345")
    assert size_of([Span(a), Span(a, 1, 3), Span(b, 0, 4)]) == 11
    assert size_of([Span(a), Span(b)]) is None


def test_what_is_missing_or_empty(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", b"x")
    (tmp_path / "none.txt").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "a.txt").touch()
    (tmp_path / "bare").mkdir()
    for name, message in {
        "corpsu.txt": "train: .*corpsu.txt' is not a file or folder .*did you mean 'corpus.txt'",
        "none.txt": "train: the file .*none.txt is empty",
        "hollow": "train: all files of .*hollow' are empty",
        "bare": r"train: the folder .*bare holds no file named \*.txt",
        "*.md": "train: no file matches the pattern",
    }.items():
        with pytest.raises(UserError, match=message):
            find_files(str(tmp_path / name), "train")
    with pytest.raises(UserError, match="accepted: 'offline', or the paths of local text files"):
        find_files("someone/hub-name", "train")
    with pytest.raises(UserError, match="did you mean 'offline'"):
        find_files("ofline", "train")
    with pytest.raises(UserError, match="list of text files is empty"):
        as_sources([], "val")


def test_undecodable_text_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE", 8)
    for suffix in OPENERS:
        path = write(tmp_path / f"a{suffix}", b"fine\nfine too\n\xc3\xa9 caf\xe9 \n")
        with pytest.raises(UserError, match=f"a{suffix} is not UTF-8 text: byte 20 cannot be decoded"):
            documents([Span(path)])
    with pytest.raises(UserError, match="byte 20 "):
        documents([Span(tmp_path / "a.txt", 5)], "fine too")


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
def test_a_broken_archive(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", bytes(range(97, 123)) * 100)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read .*a"):
        documents([Span(path)])
    with pytest.raises(UserError, match="cannot read .*a"):
        hold_out([path])
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match="cannot read .*a"):
        find_files(str(path), "train")
