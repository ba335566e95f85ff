from pathlib import Path

import pytest
import torch

from bimamba_lit.data.blocks import IGNORED, EpochOrder, EvalWindows, SeparateWindows, TrainBlocks
from bimamba_lit.data.sources import Span
from bimamba_lit.data.tokenizer import ByteTokenizer, load_tokenizer
from bimamba_lit.data.tokens import NOT_A_TARGET, TokenStream, token_stream
from bimamba_lit.errors import UserError


@pytest.fixture
def stream(texts: Path, tmp_path: Path) -> TokenStream:
    return token_stream([Span(p) for p in sorted(texts.iterdir())], ByteTokenizer(), tmp_path / "cache", sized=True)


@pytest.mark.parametrize("context", [1, 16, 100])
def test_blocks_predict_every_token_once(stream: TokenStream, context: int) -> None:
    blocks = TrainBlocks([stream], context)
    assert len(blocks) == (stream.length - 1) // context
    labels = torch.cat([blocks[i]["labels"] for i in range(len(blocks))]).tolist()
    inputs = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()
    assert labels == stream.tokens[1 : len(labels) + 1].tolist()
    assert inputs == stream.tokens[: len(inputs)].tolist()
    assert 0 <= stream.length - 1 - len(labels) < context


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (7, 3), (100_000, 100_000), (1, 1)])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_windows_count_every_target_once(stream: TokenStream, context: int, stride: int, multiple_of: int) -> None:
    windows = EvalWindows(stream, context, stride, multiple_of)
    assert len(windows) % multiple_of == 0
    targets: list[int] = []
    sizes: list[int] = []
    for index in range(len(windows)):
        item = windows[index]
        assert all(value.shape == (context,) and value.dtype == torch.int64 for value in item.values())
        counted = item["labels"] != IGNORED
        assert not item["label_bytes"][~counted].any()
        targets += item["labels"][counted].tolist()
        sizes += item["label_bytes"][counted].tolist()
        # Each label follows its input, and later windows look back on at least context - stride tokens.
        for at in counted.nonzero().flatten().tolist():
            assert item["input_ids"][at] == stream.tokens[index * stride + at]
            assert index == 0 or at >= context - stride
    kept = stream.sizes != NOT_A_TARGET
    assert targets == stream.tokens[kept].tolist()
    assert sizes == stream.sizes[kept].tolist()
    assert windows.targets == len(targets)
    if multiple_of == 1:
        assert (windows[len(windows) - 1]["labels"] != IGNORED).any()


def test_separate_windows_predict_all_of_their_ids_but_the_first(texts: Path, bpe: Path, tmp_path: Path) -> None:
    stream = token_stream([Span(texts / "1.txt")], load_tokenizer(str(bpe)), tmp_path / "cache", sized=True)
    windows = SeparateWindows(stream, 7)
    assert len(windows) == stream.length // 7 > 3
    for index in range(len(windows)):
        item, first = windows[index], index * 7
        assert item["input_ids"].tolist() == stream.tokens[first : first + 7].tolist()
        assert item["labels"].tolist() == [*stream.tokens[first + 1 : first + 7].tolist(), IGNORED]
        assert item["label_bytes"].tolist() == [*stream.sizes[first + 1 : first + 7].tolist(), 0]


def test_ranks_share_an_order_without_overlap(stream: TokenStream) -> None:
    blocks = TrainBlocks([stream], 16)
    alone = list(EpochOrder(blocks, seed=3))
    assert sorted(alone) == list(range(len(blocks)))
    ranks = next(n for n in range(3, 9) if len(alone) % n)
    shares = [list(EpochOrder(blocks, 3, ranks, rank)) for rank in range(ranks)]
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together == alone[: len(alone) // ranks * ranks]


def test_orders_of_seeds_and_epochs_are_all_different(stream: TokenStream) -> None:
    orders = []
    for seed in range(3):
        order = EpochOrder(TrainBlocks([stream], 16), seed)
        for epoch in range(3):
            order.set_epoch(epoch)
            orders.append(tuple(order))
            assert tuple(order) == orders[-1]
    assert len(set(orders)) == 9


def test_an_order_resumes_in_its_epoch(stream: TokenStream) -> None:
    order = EpochOrder(TrainBlocks([stream], 16), 1)
    order.set_epoch(5)
    whole = list(order)
    iterator = iter(order)
    begun = [next(iterator) for _ in range(4)]
    state = order.state_dict()
    resumed = EpochOrder(TrainBlocks([stream], 16), 1)
    resumed.load_state_dict(state)
    assert begun + list(resumed) == whole


def test_an_order_goes_on_with_another_number_of_ranks(stream: TokenStream) -> None:
    blocks = TrainBlocks([stream], 16)
    whole = list(EpochOrder(blocks, 1))
    half = EpochOrder(blocks, 1, ranks=2, rank=0)
    iterator = iter(half)
    for _ in range(6):
        next(iterator)
    for ranks in (1, 3, 4):
        orders = [EpochOrder(blocks, 1, ranks, rank) for rank in range(ranks)]
        for order in orders:
            order.load_state_dict(half.state_dict())
        shares = [index for step in zip(*orders, strict=True) for index in step]
        assert shares == whole[12 : len(whole) // ranks * ranks]
    with pytest.raises(UserError, match="2 processes that had read 12 sequences, which 5"):
        EpochOrder(blocks, 1, 5).load_state_dict(half.state_dict())
