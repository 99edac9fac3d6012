"""Exact copies in host memory: what was appended is read, and running out of memory costs nothing but width."""

import copy
import warnings

import pytest
import torch
from torch import Tensor

from cachequant.core import PackedCache, host
from cachequant.core.hf.tiny import tiny_model
from cachequant.core.host import HostCopy
from cachequant.strategies.qaq import QAQ

BATCH, HEADS, DIMS = 2, 3, {"key": 8, "value": 6}


def states(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {side: torch.randn(BATCH, HEADS, tokens, dim, generator=generator).to(dtype) for side, dim in DIMS.items()}


def between(whole: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {side: tensor[:, :, start:stop] for side, tensor in whole.items()}


def filled(whole: dict[str, Tensor], *pieces: int) -> HostCopy:
    copies = HostCopy()
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece
        copies.append(between(whole, start, stop))
    return copies


def assert_holds(copies: HostCopy, expected: dict[str, Tensor]) -> None:
    for side, held in copies.state().items():
        assert torch.equal(held, expected[side])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pieces", [(70,), (1,) * 70, (33, 1, 30, 6)], ids=["at once", "one by one", "pieces"])
def test_what_was_appended_is_read(pieces, dtype):
    whole = states(70, dtype=dtype)
    copies = filled(whole, *pieces)
    assert_holds(copies, whole)
    rows, heads, tokens = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), torch.tensor([69, 0, 35])
    for side in DIMS:
        assert torch.equal(copies.read(side, rows, heads, tokens), whole[side][rows, heads, tokens])
        assert torch.equal(copies.read(side, rows, None, tokens), whole[side][rows, :, tokens])


def test_bytes_are_counted_as_they_are_copied_and_held():
    copies = filled(states(70), 60, 10)
    assert copies.to_host == BATCH * HEADS * 70 * 14 * 4
    assert copies.from_host == 0
    one = torch.tensor([1])
    copies.read("key", one, one, one)
    assert copies.from_host == 8 * 4
    copies.read("value", one, None, one)
    assert copies.from_host == 8 * 4 + HEADS * 6 * 4
    held = copies.held_bytes()
    assert copies.to_host <= held <= copies.to_host * (1 + 1 / 32)
    assert HostCopy().held_bytes() == 0


def test_spare_memory_is_at_most_a_thirty_second():
    whole = states(300)
    copies = HostCopy()
    for token in range(300):
        copies.append(between(whole, token, token + 1))
        assert copies.held_bytes() <= (token + 1) * (1 + 1 / 32) * BATCH * HEADS * 14 * 4
    assert_holds(copies, whole)


@pytest.mark.parametrize("kept", [0, 1, 69, 70, 90])
def test_a_cut_gives_memory_back_and_is_appended_to(kept):
    whole, other = states(70), states(20, seed=1)
    copies = filled(whole, 60, 10)
    copies.truncate(kept)
    left = min(kept, 70)
    assert_holds(copies, between(whole, 0, left))
    if kept < 70:
        assert copies.held_bytes() == left * BATCH * HEADS * 14 * 4
    copies.append(other)
    assert_holds(copies, {side: torch.cat([whole[side][:, :, :left], other[side]], dim=2) for side in DIMS})


def test_rows_of_the_batch_are_reordered_and_repeated():
    whole, other = states(70), states(20, seed=1)
    copies = filled(whole, 60, 10)
    order = [1, 0, 1]
    whole_bytes = copies.held_bytes()
    copies.reorder(torch.tensor([1, 0]))
    copies.reorder(torch.tensor([0, 1, 0]))  # the two as one
    held = copies.held_bytes()
    assert held == whole_bytes + 8 * len(order)
    at = torch.arange(len(order))
    for side in DIMS:  # read where they lie, before anything moves
        assert torch.equal(copies.read(side, at, None, at), whole[side][order, :, at])
    assert copies.held_bytes() == held
    copies.append({side: tensor[order] for side, tensor in other.items()})
    assert_holds(copies, {side: torch.cat([whole[side], other[side]], dim=2)[order] for side in DIMS})


def test_a_deep_copy_shares_nothing():
    whole, other = states(70), states(70, seed=1)
    copies = filled(whole, 70)
    twin = copy.deepcopy(copies)
    twin.truncate(3)
    twin.append(between(other, 3, 70))
    assert_holds(copies, whole)
    assert (twin.lost, twin.to_host, twin.from_host) == (False, copies.to_host // 70 * 137, 0)


@pytest.mark.parametrize("kept", [0, 50, 70])
def test_copies_are_restored_with_their_counts(kept):
    whole, other = states(70), states(5, seed=1)
    copies = filled(whole, 70)
    copies.truncate(kept)
    restored = HostCopy()
    restored.restore(copies.state(), {"lost": False, "to_host": copies.to_host, "from_host": 12})
    assert (restored.lost, restored.to_host, restored.from_host) == (False, copies.to_host, 12)
    for each in (copies, restored):
        each.append(other)
        assert_holds(each, {side: torch.cat([whole[side][:, :, :kept], other[side]], dim=2) for side in DIMS})


# ---- no memory -------------------------------------------------------------------------------------------------------


class Exhausted:
    """`torch` as the module sees it, once host memory is gone."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        self.error, self.left = error, after

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *shape, **settings):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return torch.empty(*shape, **settings)


ERRORS = {"host": MemoryError("no host memory"), "driver": RuntimeError("CUDA error: cannot pin")}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("after", [0, 1], ids=["keys", "values"])
def test_exhausted_memory_lets_the_copies_go_with_a_warning(monkeypatch, error, after):
    copies = filled(states(70), 70)
    monkeypatch.setattr(host, "torch", Exhausted(error, after))
    with pytest.warns(UserWarning, match=f"ran out .{error}"):
        copies.append(states(40))
    assert copies.lost
    assert copies.held_bytes() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copies.append(states(40))
        copies.truncate(5)
        copies.reorder(torch.tensor([0]))
    assert copy.deepcopy(copies).lost
    assert copies.state() == {}


@pytest.mark.parametrize("change", ["truncate", "reorder"])
def test_memory_that_runs_out_on_the_way_lets_the_copies_go_as_well(monkeypatch, change):
    def fails(*_):
        raise ERRORS["driver"]

    copies = filled(states(70), 70)
    monkeypatch.setattr(host, "compact", fails)
    with pytest.warns(UserWarning, match="cannot pin"):
        if change == "truncate":
            copies.truncate(20)
        else:
            copies.reorder(torch.tensor([1, 0]))
            copies.append(states(5))
    assert copies.lost
    assert copies.held_bytes() == 0


@torch.no_grad()
def test_a_cache_whose_host_memory_is_exhausted_goes_on_and_tokens_only_narrow(monkeypatch):
    model = tiny_model()
    ids = torch.randint(2, 97, (2, 150), generator=torch.Generator().manual_seed(1))
    cache = PackedCache(model, QAQ(interval=8, hysteresis=0), residual_length=8)
    model(ids[:, :80], past_key_values=cache)
    monkeypatch.setattr(host, "torch", Exhausted(ERRORS["host"]))
    with pytest.warns(UserWarning, match="going on as with host_copy=False") as noted:
        model(ids[:, 80:88], past_key_values=cache)
    assert len(noted) == len(cache.packed_layers)
    assert cache.memory().host_bytes == 0
    before = [layer.pools["value"].widths for layer in cache.packed_layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = torch.cat([model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(88, 150)])
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 150
    for layer, widths in zip(cache.packed_layers, before, strict=True):
        now = layer.pools["value"].widths
        assert now.shape == (2, 136)
        assert (now > 0).all()
        assert (now[:, :80] <= widths).all()
        assert (now[:, :80] < widths).any()
