"""What is remembered of attention is what the newest queries gave, whatever the forwards they came in."""

import pytest
import torch
from torch import Tensor

from cachequant.core.history import AttentionHistory

BATCH, HEADS = 2, 3


def attention(tokens: int) -> Tensor:
    """Causal attention of as many queries as tokens."""
    scores = torch.rand(BATCH, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(tokens))
    return scores.tril()


def told(window: int | None, full: Tensor, *pieces: int) -> AttentionHistory:
    """A history that was told `full` in pieces of so many queries."""
    history = AttentionHistory(window)
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece
        history.add(full[:, :, start:stop, :stop], stop)
    return history


PIECES = {"at once": (12,), "prompt and steps": (9, 1, 1, 1), "chunks": (3, 4, 5), "one by one": (1,) * 12}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [1, 5, 12, 40], ids="window={}".format)
def test_a_window_holds_the_newest_queries(window, pieces):
    full = attention(12)
    history = told(window, full, *pieces)
    assert torch.equal(history.rows, full[:, :, -window:])
    assert torch.equal(history.read(12), full[:, :, -window:])
    assert history.held_bytes() == history.rows.numel() * 4


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_sum_holds_all_queries_in_one_row(pieces):
    full = attention(12)
    history = told(None, full, *pieces)
    torch.testing.assert_close(history.read(12), full.sum(2, keepdim=True))


def test_yes_and_no_are_remembered_like_numbers():
    full = attention(12) > 0.5
    assert torch.equal(told(5, full, 9, 1, 1, 1).rows, full[:, :, -5:])
    assert torch.equal(told(None, full.long(), 9, 3).rows, full.sum(2, keepdim=True))


def test_queries_before_a_gap_are_forgotten_by_a_window_and_stay_in_a_sum():
    full = attention(12)
    for window, expected in (
        (5, full[:, :, 10:]),
        (None, (full[:, :, :7].sum(2) + full[:, :, 10:].sum(2))[:, :, None]),
    ):
        history = told(window, full, 7)
        history.add(full[:, :, 10:], 12)
        torch.testing.assert_close(history.rows, expected)


def test_a_window_whose_newest_query_went_unseen_says_nothing():
    full = attention(12)
    assert told(5, full, 10).read(12) is None
    assert AttentionHistory(5).read(12) is None
    unseen = told(None, full, 10).read(12)
    torch.testing.assert_close(unseen[..., :10], full[:, :, :10, :10].sum(2, keepdim=True))
    assert not unseen[..., 10:].any()


# ---- layers that borrow keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [1, 5, 12, None], ids="window={}".format)
def test_what_borrowing_layers_give_is_joined(window, pieces):
    owner, borrower = attention(12), attention(12).flip(1)
    history = AttentionHistory(window)
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece
        for full in (owner, borrower):
            history.add(full[:, :, start:stop, :stop], stop)
    if window is None:
        torch.testing.assert_close(history.rows, (owner + borrower).sum(2, keepdim=True))
    else:
        assert torch.equal(history.rows, torch.maximum(owner, borrower)[:, :, -window:])


@pytest.mark.parametrize("window", [5, 12, None], ids="window={}".format)
@pytest.mark.parametrize("tile", [1, 2, 5])
def test_a_borrowing_layer_may_tell_its_queries_some_at_a_time(window, tile):
    owner, borrower = attention(12), attention(12).flip(1)
    history = told(window, owner, 12)
    for stop in range(tile, 12 + tile, tile):
        stop = min(stop, 12)
        start = (stop - 1) // tile * tile
        history.add(borrower[:, :, start:stop, :stop], stop)
    if window is None:
        torch.testing.assert_close(history.rows, (owner + borrower).sum(2, keepdim=True))
    else:
        assert torch.equal(history.rows, torch.maximum(owner, borrower)[:, :, -window:])
    assert history.queries == 12


def test_a_borrowing_layer_may_tell_fewer_or_more_queries_than_are_left():
    owner, borrower = attention(12), attention(12).flip(1)
    history = told(5, owner, 12)
    history.forget(2)
    history.add(borrower[:, :, 8:], 12)
    expected = borrower[:, :, 8:].clone()
    expected[:, :, 2:] = torch.maximum(owner, borrower)[:, :, 10:]
    assert torch.equal(history.rows, expected)
    history.add(owner[:, :, 11:] + 1, 12)
    assert torch.equal(history.rows[:, :, :3], expected[:, :, :3])
    assert torch.equal(history.rows[:, :, 3:], owner[:, :, 11:] + 1)


# ---- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 11, 12, 20])
def test_a_cut_window_holds_the_queries_that_are_left(kept):
    full = attention(12)
    history = told(5, full, 12)
    history.truncate(kept)
    left = min(kept, 12)
    if left <= 7:
        assert history.rows is None
    else:
        assert torch.equal(history.rows, full[:, :, 7:left, :left])
    history.add(full[:, :, left:, :], 12) if left < 12 else None
    assert torch.equal(history.rows, full[:, :, max(7, left if left < 7 else 7) :])


def test_a_cut_sum_forgets_the_tokens_not_what_their_queries_gave():
    full = attention(12)
    history = told(None, full, 12)
    history.truncate(7)
    torch.testing.assert_close(history.read(7), full.sum(2, keepdim=True)[..., :7])
    history.truncate(0)
    assert history.read(0) is None


def test_a_cut_of_what_was_forgotten_lets_it_be_told_again():
    full = attention(12)
    history = told(5, full, 12)
    history.forget(0)
    history.truncate(4)
    history.add(full[:, :, 4:6, :6], 6)
    assert torch.equal(history.rows, full[:, :, 4:6, :6])
    assert history.queries == 6


@pytest.mark.parametrize("kept", [0, 1, 5, 9])
def test_forgetting_keeps_the_newest_rows_of_a_window_and_a_sum_whole(kept):
    full = attention(12)
    window, total = told(5, full, 12), told(None, full, 12)
    window.forget(kept)
    total.forget(kept)
    torch.testing.assert_close(total.rows, full.sum(2, keepdim=True))
    if kept:
        assert torch.equal(window.rows, full[:, :, -min(kept, 5) :])
        assert window.held_bytes() == window.rows.numel() * 4
    else:
        assert window.rows is None
        assert window.held_bytes() == 0


def test_rows_of_the_batch_are_reordered_and_repeated():
    full = attention(12)
    history = told(5, full, 12)
    history.map(lambda tensor: tensor[[1, 1, 0]])
    assert torch.equal(history.rows, full[[1, 1, 0], :, -5:])
    empty = AttentionHistory(5)
    empty.map(lambda tensor: tensor[[1]])
    assert empty.rows is None
