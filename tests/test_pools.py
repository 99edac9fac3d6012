"""Pools of packed rows give back every token as a dictionary of rows would, and never fill with holes."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from cachequant.core import pools as pools_module
from cachequant.core.pools import ROWS, RowPools
from cachequant.kernels.format import Format
from cachequant.kernels.rows import decode_rows, encode_rows, half_dtype, recode_rows, row_ends

WIDTHS = (0, 2, 3, 4, 8, 16)
DIM = 12
GRIDS = {
    "midpoint": {"grid": "midpoint"},
    "midpoint-outliers": {"grid": "midpoint", "trim": 1, "outliers": 2},
    "mean": {"grid": "mean"},
    "ends": {},
}


def formats(grid: str = "midpoint", widths: tuple[int, ...] = WIDTHS) -> tuple[Format, ...]:
    packed = [Format(bits=bits, **GRIDS[grid]) for bits in widths if 0 < bits < 16]
    return (*packed, *([Format(codes="exact")] if 16 in widths else []))


class Model:
    """Pools, and beside them the rows of every token in a dictionary."""

    def __init__(
        self, owners: int = 3, heads: int = 1, grid: str = "midpoint", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        self.heads = heads
        self.numbers = heads * DIM
        self.generator = torch.Generator().manual_seed(seed)
        self.like = torch.empty(0, dtype=dtype)
        self.pools = RowPools(formats(grid), owners, heads, DIM, self.like)
        self.exact = torch.empty(owners, 0, self.numbers, dtype=dtype)
        self.rows: dict[tuple[int, int], tuple[int, dict[str, Tensor]]] = {}

    def decide(self, widths: Tensor) -> None:
        """Give tokens the widths `[owners, n]`; those beyond what is held are new."""
        held = self.exact.shape[1]
        shape = (len(widths), widths.shape[1] - held, self.numbers)
        fresh = torch.randn(shape, generator=self.generator).to(self.exact.dtype)
        self.exact = torch.cat([self.exact, fresh], dim=1)
        self.pools = self.pools.rebuilt(widths, fresh, lambda owner, token: self.exact[owner, token])
        for (owner, token), width in zip(product(*map(range, widths.shape)), widths.flatten().tolist(), strict=True):
            before, rows = self.rows.get((owner, token), (0, {}))
            fmt = self.pools.formats.get(width)
            if width == before:
                pass
            elif width == 0:
                rows = {}
            elif width > before:
                rows = encode_rows(self.exact[owner, token][None], fmt)
            else:
                rows = recode_rows(rows, self.pools.formats[before], fmt, self.numbers)
            self.rows[owner, token] = width, rows

    def random_widths(self, tokens: int) -> Tensor:
        choice = torch.randint(len(WIDTHS), (len(self.exact), tokens), generator=self.generator)
        return torch.tensor(WIDTHS, dtype=torch.uint8)[choice]

    def dense(self) -> Tensor:
        dense = torch.zeros(*self.pools.widths.shape, self.numbers, dtype=torch.float64)
        for (owner, token), (width, rows) in self.rows.items():
            if width:
                dense[owner, token] = decode_rows(rows, self.pools.formats[width], self.numbers, torch.float64)[0]
        return dense

    def assert_same(self) -> None:
        """Every way of reading gives what the dictionary holds."""
        owners, tokens = self.pools.widths.shape
        dense = self.dense()
        assert torch.equal(self.pools.dense(torch.float64), dense)
        query = torch.randn(owners, self.heads, 5, DIM, generator=self.generator, dtype=torch.float64)
        apart = dense.unflatten(-1, (self.heads, DIM)).transpose(1, 2)
        scores = (query @ apart.transpose(-1, -2)).masked_fill((self.pools.widths == 0)[:, None, None], -torch.inf)
        torch.testing.assert_close(self.pools.scores(query), scores)
        weights = torch.rand(owners, self.heads, 5, tokens, generator=self.generator, dtype=torch.float64)
        torch.testing.assert_close(self.pools.mix(weights), weights @ apart)
        low, high = self.pools.ends(1)
        for (owner, token), (width, rows) in self.rows.items():
            ends = row_ends(rows, self.pools.formats[width], 1) if width else torch.zeros(2, 1)
            assert [low[owner, token], high[owner, token]] == [end.item() for end in ends]

    def assert_full(self) -> None:
        assert_full(self.pools)


def assert_full(pools: RowPools) -> None:
    """No more rows than tokens need, but for the last block of each owner and width."""
    widths = pools.widths
    for width, pool in pools._pools.items():
        tokens = (widths == width).sum(1)
        assert pool.capacity == (-(-tokens // ROWS) * ROWS).sum()
        assert pool.capacity <= tokens.sum() + (ROWS - 1) * len(widths)
        assert all(rows.shape[:2].numel() == pool.capacity for rows in pool.rows.values())
    assert set(pools._pools) == set(widths.unique().tolist()) - {0}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("heads", [1, 2], ids="heads={}".format)
@pytest.mark.parametrize("owners", [1, 3], ids="owners={}".format)
def test_tokens_that_move_at_random_are_read_as_from_a_dictionary(owners, heads, grid):
    model = Model(owners, heads, grid)
    for tokens in (40, 40, 70):
        model.decide(model.random_widths(tokens))
        model.assert_same()
        model.assert_full()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype_of_a_model_is_read_as_from_a_dictionary(dtype):
    model = Model(dtype=dtype)
    for _ in range(2):
        model.decide(model.random_widths(50))
        model.assert_same()
    assert model.pools._pools[16].rows["exact"].dtype == half_dtype(dtype)


@pytest.mark.parametrize(("before", "after"), list(product(WIDTHS, repeat=2)), ids=lambda width: f"{width}bit")
def test_a_token_moves_from_any_width_to_any(before, after):
    model = Model(owners=2)
    model.decide(torch.tensor([[before, 3, before], [4, before, 8]], dtype=torch.uint8))
    untouched = model.pools.dense(torch.float64)[:, 1:]
    widths = model.pools.widths.clone()
    widths[0, 0] = after
    model.decide(widths)
    model.assert_same()
    model.assert_full()
    assert torch.equal(model.pools.dense(torch.float64)[:, 1:], untouched)
    if after >= before and after:
        original = model.exact[0, :1]
        fmt = model.pools.formats[after]
        assert torch.equal(
            model.pools.dense(torch.float64)[0, :1],
            decode_rows(encode_rows(original, fmt), fmt, DIM, torch.float64),
        )


@pytest.mark.parametrize("wide", [3, 4, 8], ids="{}bit".format)
def test_a_token_of_midpoint_cells_that_narrows_is_as_near_as_if_it_had_never_been_wide(wide):
    model = Model(owners=1)
    for width in (wide, 2):
        model.decide(torch.full((1, 40), width, dtype=torch.uint8))
    assert_within_cells(model.pools, model.exact)


def assert_within_cells(pools: RowPools, exact: Tensor) -> None:
    """Every number is off by half a cell at most, and by the rounding of scale and zero."""
    bits = pools.widths.double()[..., None].clamp(max=11)
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    off = (pools.dense(torch.float64) - exact).abs()[pools.widths > 0]
    bound = (high - low) / 2**bits / 2 + (high - low + exact.abs().amax(-1, keepdim=True)) * 2**-10
    assert (off <= bound.expand(exact.shape)[pools.widths > 0]).all()


def test_deciding_leaves_the_old_pools_as_they_were():
    model = Model()
    model.decide(model.random_widths(60))
    old, widths, dense = model.pools, model.pools.widths.clone(), model.pools.dense(torch.float64)
    model.decide(model.random_widths(80))
    assert torch.equal(old.widths, widths)
    assert torch.equal(old.dense(torch.float64), dense)


def test_what_widens_is_read_exactly_and_nothing_else_is_asked_for():
    model = Model(owners=2)
    model.decide(torch.tensor([[2, 4, 0, 16], [8, 8, 3, 0]], dtype=torch.uint8))
    asked = []

    def exact(owner: Tensor, token: Tensor) -> Tensor:
        asked.extend(zip(owner.tolist(), token.tolist(), strict=True))
        return model.exact[owner, token]

    widths = torch.tensor([[4, 2, 3, 16], [8, 16, 3, 0]], dtype=torch.uint8)
    model.pools.rebuilt(widths, model.exact[:, :0], exact)
    assert sorted(asked) == [(0, 0), (0, 2), (1, 1)]


# ---- choosing, and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 69, 70])
@pytest.mark.parametrize("owners", [1, 3], ids="owners={}".format)
def test_a_cut_keeps_the_first_tokens_and_no_memory_of_the_others(owners, tokens):
    model = Model(owners)
    model.decide(model.random_widths(70))
    cut = model.pools.truncated(tokens)
    assert torch.equal(cut.widths, model.pools.widths[:, :tokens])
    assert torch.equal(cut.dense(torch.float64), model.dense()[:, :tokens])
    assert_full(cut)
    assert cut.held_bytes() == sum(tensor.numel() * tensor.element_size() for tensor in cut.tensors())


@pytest.mark.parametrize("chosen", [[0], [2, 0], [1, 1, 2, 0, 1], []], ids=str)
def test_owners_are_chosen_and_repeated(chosen):
    model = Model()
    model.decide(model.random_widths(70))
    selected = model.pools.selected(torch.tensor(chosen, dtype=torch.long))
    assert torch.equal(selected.widths, model.pools.widths[chosen])
    assert torch.equal(selected.dense(torch.float64), model.dense()[chosen])
    assert_full(selected)


CHANGES: dict[str, Callable[[RowPools], RowPools]] = {
    "cut": lambda pools: pools.truncated(45),
    "selected": lambda pools: pools.selected(torch.tensor([2, 0, 1])),
    "restored": lambda pools: RowPools(tuple(pools.formats.values()), 1, 1, DIM, torch.empty(0)).restored(
        {name: tensor.clone() for name, tensor in pools.state().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_pools_go_on_as_the_dictionary_does(change):
    model = Model()
    model.decide(model.random_widths(70))
    model.pools = change(model.pools)
    order = [2, 0, 1] if change is CHANGES["selected"] else [0, 1, 2]
    tokens = model.pools.tokens
    model.rows = {(owner, token): model.rows[order[owner], token] for owner, token in product(range(3), range(tokens))}
    model.exact = model.exact[order, :tokens]
    model.assert_same()
    model.decide(model.random_widths(90))
    model.assert_same()
    model.assert_full()


def test_a_file_holds_what_is_held():
    model = Model(heads=2)
    model.decide(model.random_widths(70))
    state = model.pools.state()
    restored = RowPools(formats(), 1, 2, DIM, model.like).restored(state)
    assert torch.equal(restored.widths, model.pools.widths)
    assert torch.equal(restored.dense(torch.float64), model.dense())
    assert restored.used_bytes() == model.pools.used_bytes()


@pytest.mark.parametrize("owners", [1, 3], ids="owners={}".format)
def test_bytes_used_are_those_of_the_rows_and_the_others_are_spare(owners):
    model = Model(owners, grid="midpoint-outliers")
    model.decide(model.random_widths(70))
    used, empty = model.pools.used_bytes(), 0
    for width, pool in model.pools._pools.items():
        rows = pool.capacity - int((model.pools.widths == width).sum())
        empty += rows * sum(tensor[0, 0].nbytes for tensor in pool.rows.values())
    assert sum(used.values()) + empty == model.pools.held_bytes()
    assert set(used) == {"widths", "codes", "scales", "outlier_index", "outlier_value", "exact"}


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", [1, 3], ids="owners={}".format)
def test_reading_and_packing_some_rows_at_a_time_is_the_same(owners, monkeypatch):
    whole, pieces = Model(owners, heads=2), Model(owners, heads=2)
    whole.decide(whole.random_widths(150))
    monkeypatch.setattr(pools_module, "CHUNK_NUMBERS", 100)
    pieces.decide(pieces.random_widths(150))
    assert torch.equal(whole.pools.dense(torch.float64), pieces.pools.dense(torch.float64))
    pieces.assert_same()
    pieces.assert_full()


@pytest.mark.parametrize("grid", ["midpoint", "midpoint-outliers"])
@pytest.mark.parametrize("heads", [1, 2], ids="heads={}".format)
@pytest.mark.parametrize("owners", [1, 3], ids="owners={}".format)
def test_many_queries_are_answered_as_few_are(owners, heads, grid, monkeypatch):
    model = Model(owners, heads, grid)
    model.decide(model.random_widths(70))
    many = pools_module.MANY_LINES
    query = torch.randn(owners, heads, many, DIM, generator=model.generator, dtype=torch.float64)
    weights = torch.rand(owners, heads, many, 70, generator=model.generator, dtype=torch.float64)
    few = model.pools.scores(query[:, :, :-1]), model.pools.mix(weights[:, :, :-1])
    # a few tokens at a time
    monkeypatch.setattr(pools_module, "CHUNK_NUMBERS", 1000)
    torch.testing.assert_close(model.pools.scores(query)[:, :, :-1], few[0])
    torch.testing.assert_close(model.pools.mix(weights)[:, :, :-1], few[1])


@pytest.mark.parametrize("lines", [3, pools_module.MANY_LINES], ids="lines={}".format)
def test_gradients_reach_queries_and_weights(lines):
    model = Model(owners=2)
    model.decide(model.random_widths(40))
    query = torch.randn(2, 1, lines, DIM, requires_grad=True)
    scores = model.pools.scores(query)
    scores.masked_fill(scores == -torch.inf, 0).sum().backward()
    expected = model.dense().sum(1)[:, None, None].expand(query.shape)
    torch.testing.assert_close(query.grad.double(), expected, rtol=1e-4, atol=1e-4)
    weights = torch.rand(2, 1, lines, 40, requires_grad=True)
    model.pools.mix(weights).sum().backward()
    expected = model.dense().sum(2)[:, None, None].expand(weights.shape)
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_pools_of_no_tokens_are_read():
    pools = RowPools(formats(), 2, 1, DIM, torch.empty(0))
    assert pools.scores(torch.ones(2, 1, 3, DIM)).shape == (2, 1, 3, 0)
    assert torch.equal(pools.mix(torch.ones(2, 1, 3, 0)), torch.zeros(2, 1, 3, DIM))
    many = pools_module.MANY_LINES
    assert pools.scores(torch.ones(2, 1, many, DIM)).shape == (2, 1, many, 0)
    assert torch.equal(pools.mix(torch.ones(2, 1, many, 0)), torch.zeros(2, 1, many, DIM))
    assert pools.dense(torch.float32).shape == (2, 0, DIM)
    assert [end.shape for end in pools.ends(0)] == [(2, 0)] * 2
    assert pools.truncated(0).tokens == 0


def test_pools_of_which_all_was_dropped_are_read():
    model = Model()
    model.decide(torch.zeros(3, 40, dtype=torch.uint8))
    model.assert_same()
    assert model.pools._pools == {}
    model.decide(torch.full((3, 40), 4, dtype=torch.uint8))
    model.assert_same()


def test_ten_thousand_steps_leave_no_holes():
    generator = torch.Generator().manual_seed(0)
    ladder = torch.tensor([0, 2, 4, 16], dtype=torch.uint8)
    exact = torch.randn(2, 168, 4, generator=generator)
    pools = RowPools(formats(widths=(2, 4, 16)), 2, 1, 4, exact)
    most = 0
    for step in range(0, 10_000, 8):
        # as with an interval of 8
        if pools.tokens > 150:
            pools = pools.truncated(int(torch.randint(150, (), generator=generator)))
        held = pools.tokens
        fresh = exact[:, held : held + 8]
        widths = torch.nn.functional.pad(pools.widths, (0, fresh.shape[1]), value=4)
        # a few tokens move: up, down or out
        moving = torch.rand(widths.shape, generator=generator) < 0.1
        chosen = torch.randint(len(ladder), widths.shape, generator=generator)
        widths = torch.where(moving, ladder[chosen], widths)
        pools = pools.rebuilt(widths, fresh, lambda owner, token: exact[owner, token])
        most = max(most, pools.held_bytes())
        assert_full(pools)
        if step % 400 == 0:
            assert_within_cells(pools, exact[:, : pools.tokens])
    assert_within_cells(pools, exact[:, : pools.tokens])
    # widths, all rows at their widest, the last blocks, and whose the blocks are
    assert most < 2 * 158 * (1 + 8) + 3 * 2 * (ROWS * 8 + 8) + 8 * 10
