"""Kernels read pools as a dense copy of them would be read. Needs TRITON_INTERPRET=1."""

import warnings
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cachequant.core.pools import ROWS, RowPools
from cachequant.kernels import backend, quantize
from cachequant.kernels.format import Format
from cachequant.kernels.triton import rows as kernels

WIDTHS = (0, 2, 3, 4, 8, 16)
TOLERANCE = 5e-4

empty = torch.empty


@pytest.fixture(autouse=True)
def poisoned_and_without_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is not written is NaN, and whatever is left to torch is an error."""

    def poisoned(*sizes: int, **options: object) -> Tensor:
        tensor = empty(*sizes, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    assert backend.triton_serves(torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", poisoned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    backend.warn_once.cache_clear()


def formats(widths: tuple[int, ...] = WIDTHS, trim: int = 0, grid: str = "midpoint") -> tuple[Format, ...]:
    packed = [Format(bits=bits, grid=grid, trim=trim, outliers=2 * trim) for bits in widths if 0 < bits < 16]
    return (*packed, *([Format(codes="exact")] if 16 in widths else []))


def random_states(owners: int, tokens: int, numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(numbers)
    states = torch.randn(owners, tokens, numbers, generator=generator) + torch.linspace(-2, 1, numbers)
    return states.to(dtype)


def random_widths(owners: int, tokens: int, widths: tuple[int, ...] = WIDTHS) -> Tensor:
    choice = torch.randint(len(widths), (owners, tokens), generator=torch.Generator().manual_seed(tokens))
    return torch.tensor(widths, dtype=torch.uint8)[choice]


def pooled(states: Tensor, heads: int, widths: Tensor, rows: tuple[Format, ...]) -> RowPools:
    """Pools of `states [owners, tokens, heads * dim]`, encoded by the reference."""
    with patch.object(quantize, "triton_serves", return_value=False):
        empty_pools = RowPools(rows, len(states), heads, states.shape[2] // heads, states)
        return empty_pools.rebuilt(widths, states, None)


def dense(pools: RowPools) -> Tensor:
    """float64 `[owners, heads, tokens, dim]`."""
    return pools.dense(torch.float64).unflatten(-1, (pools.heads, pools.dim)).transpose(1, 2)


def random_lines(pools: RowPools, lines: int, length: int) -> Tensor:
    shape = (len(pools.widths), pools.heads, lines, length)
    return torch.randn(shape, generator=torch.Generator().manual_seed(lines))


def assert_read(pools: RowPools, query: Tensor, weights: Tensor, tolerance: float = TOLERANCE) -> None:
    """Scores and mixes are as near to those in float64 as float16 operands allow, for every line."""
    states = dense(pools)
    dropped = (pools.widths == 0)[:, None, None].expand(-1, *query.shape[1:3], -1)
    scores = pools.scores(query).double()
    assert torch.equal(scores == -torch.inf, dropped)
    off = (scores.masked_fill(dropped, 0) - (query.double() @ states.transpose(-1, -2)).masked_fill(dropped, 0)).abs()
    reach = query.double().norm(dim=-1)[..., None] * states.norm(dim=-1)[:, :, None]
    assert (off <= tolerance * reach).all()
    expected = weights.double() @ states
    reach = (weights.double().abs() @ states.abs()).amax(-1, keepdim=True)
    assert ((pools.mix(weights).double() - expected).abs() <= tolerance * reach).all()


def assert_read_by_random_lines(pools: RowPools, lines: int, tolerance: float = TOLERANCE) -> None:
    weights = random_lines(pools, lines, pools.tokens).exp()
    assert_read(pools, random_lines(pools, lines, pools.dim), weights, tolerance)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (1, 80), (1, 96), (1, 128), (1, 256), (2, 80), (2, 128)], ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:], ids="{}bit".format)
def test_every_width_is_read_at_every_head_dim(width, heads, dim):
    rows = formats((width,), trim=1 if width < 16 else 0)
    states = random_states(1, 40, heads * dim, torch.float16)
    assert_read_by_random_lines(pooled(states, heads, torch.full((1, 40), width, dtype=torch.uint8), rows), 3)


@pytest.mark.parametrize(("trim", "owners", "lines"), [(0, 1, 1), (2, 3, 8), (0, 2, 9), (2, 1, 65)], ids=str)
def test_mixed_widths_are_read_by_any_number_of_queries(trim, owners, lines):
    states = random_states(owners, 120, 64)
    assert_read_by_random_lines(pooled(states, 1, random_widths(owners, 120), formats(trim=trim)), lines)


@pytest.mark.parametrize("heads", [3, 8])
def test_all_heads_of_a_layer_in_one_row_are_read(heads):
    pools = pooled(random_states(1, 70, heads * 64), heads, random_widths(1, 70), formats(trim=2))
    assert_read_by_random_lines(pools, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_of_16_bits_are_read_in_the_dtype_of_the_model(dtype):
    states = random_states(2, 50, 128, dtype)
    assert_read_by_random_lines(pooled(states, 1, random_widths(2, 50, (0, 16)), formats((0, 16))), 4)


@pytest.mark.parametrize("grid", ["ends", "mean"])
def test_other_grids_are_read(grid):
    pools = pooled(random_states(2, 50, 64), 1, random_widths(2, 50), formats(grid=grid))
    assert_read_by_random_lines(pools, 4)


@pytest.mark.parametrize("tokens", [ROWS - 1, ROWS, 3 * kernels.TILE + 1])
def test_rows_end_anywhere_in_a_tile(tokens):
    assert_read_by_random_lines(pooled(random_states(1, tokens, 64), 1, random_widths(1, tokens, (4,)), formats()), 2)


def test_many_partial_sums_are_as_one(monkeypatch):
    pools = pooled(random_states(2, 200, 64), 1, random_widths(2, 200, (2, 4)), formats(trim=1))
    weights = random_lines(pools, 2, 200)
    once = pools.mix(weights)
    monkeypatch.setattr(kernels, "TILES_PER_SUM", 1)
    torch.testing.assert_close(pools.mix(weights), once, rtol=0, atol=1e-3)
    assert_read_by_random_lines(pools, 2)


def test_owners_without_a_row_of_some_width_are_read():
    widths = torch.tensor([[2] * 40, [16] * 40, [0] * 40, [4] * 40], dtype=torch.uint8)
    assert_read_by_random_lines(pooled(random_states(4, 40, 64), 1, widths, formats(trim=1)), 3)


def test_pools_of_which_nothing_is_left_are_read():
    pools = pooled(random_states(2, 40, 64), 1, torch.zeros(2, 40, dtype=torch.uint8), formats())
    assert_read_by_random_lines(pools, 3)
    none = RowPools(formats(), 2, 1, 64, torch.zeros(0))
    assert none.scores(torch.ones(2, 1, 3, 64)).shape == (2, 1, 3, 0)
    assert torch.equal(none.mix(torch.ones(2, 1, 3, 0)), torch.zeros(2, 1, 3, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_dtype_they_were_asked_in(dtype):
    pools = pooled(random_states(1, 40, 64), 1, random_widths(1, 40), formats())
    query, weights = (random_lines(pools, 2, length).to(dtype) for length in (64, 40))
    assert pools.scores(query).dtype == pools.mix(weights).dtype == dtype


def test_queries_and_weights_that_are_views_are_read():
    pools = pooled(random_states(2, 50, 128), 2, random_widths(2, 50), formats(trim=1))
    query = random_lines(pools, 64, 5).transpose(2, 3)
    weights = torch.randn(2, 2, 5, 60)[..., 7:57]
    assert_read(pools, query, weights)
    assert_read(pools, query[..., :1, :].expand(-1, -1, 3, -1), weights.transpose(2, 3).contiguous().transpose(2, 3))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "size"), [*((1, size) for size in (1e-30, 1e-4, 1e4, 1e30)), (2, 1e-30), (2, 1e30)])
def test_no_size_of_queries_and_weights_over_or_underflows(heads, size):
    pools = pooled(random_states(1, 60, heads * 64), heads, random_widths(1, 60), formats(trim=1))
    query, weights = (random_lines(pools, 4, length) * size for length in (64, 60))
    query[..., 0, 0] *= 1e3
    weights[..., 0] *= 1e3
    assert_read(pools, query, weights)


def test_rows_of_very_different_size_are_each_read_exactly():
    states = random_states(1, 100, 64) * torch.logspace(-3, 4, 100)[:, None]
    states[:, 50] = 0
    states[:, 51] = 60000.0
    states[:, 52] = 0
    states[:, 52, 7] = -60000.0
    pools = pooled(states, 1, random_widths(1, 100), formats(trim=1))
    weights = random_lines(pools, 3, 100).exp()
    assert_read(pools, random_lines(pools, 3, 64), weights)
    # each line looks at one row
    assert_read(pools, random_lines(pools, 100, 64), torch.eye(100)[None, None] + 1e-12)


def test_bfloat16_rows_beyond_float16_are_read():
    states = random_states(1, 40, 64, torch.bfloat16) * torch.logspace(-20, 20, 40, dtype=torch.bfloat16)[:, None]
    pools = pooled(states, 1, torch.full((1, 40), 16, dtype=torch.uint8), formats((16,)))
    assert_read_by_random_lines(pools, 3)


def test_lines_without_a_weight_and_queries_of_zeros_give_zeros():
    pools = pooled(random_states(1, 60, 64), 1, random_widths(1, 60, (2, 4, 8, 16)), formats(trim=1))
    assert torch.equal(pools.scores(torch.zeros(1, 1, 2, 64)), torch.zeros(1, 1, 2, 60))
    assert torch.equal(pools.mix(torch.zeros(1, 1, 2, 60)), torch.zeros(1, 1, 2, 64))


def test_a_row_of_nothing_but_outliers_is_read():
    states = torch.zeros(1, 2, 64)
    states[:, :, 3], states[:, :, 63] = -20.0, 7.0
    pools = pooled(states, 1, torch.tensor([[2, 3]], dtype=torch.uint8), formats(trim=1))
    torch.testing.assert_close(pools.scores(torch.eye(64)[None, None])[0, 0].T, states[0])
    torch.testing.assert_close(pools.mix(torch.eye(2)[None, None])[0, 0], states[0])


def test_the_same_is_read_twice():
    pools = pooled(random_states(2, 50, 64), 1, random_widths(2, 50, (2, 16)), formats(trim=1))
    query, weights = random_lines(pools, 4, 64), random_lines(pools, 4, 50)
    assert torch.equal(pools.scores(query), pools.scores(query))
    assert torch.equal(pools.mix(weights), pools.mix(weights))


# ---- pools -----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[RowPools], RowPools]] = {
    "cut": lambda pools: pools.truncated(45),
    "selected": lambda pools: pools.selected(torch.tensor([2, 0, 0, 1])),
    "restored": lambda pools: pools.restored({name: tensor.clone() for name, tensor in pools.state().items()}),
    "decided": lambda pools: pools.rebuilt(pools.widths.clamp(max=2), torch.zeros(3, 0, 64), None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_pools_are_read(change):
    pools = pooled(random_states(3, 50, 64), 1, random_widths(3, 50, (0, 2, 8)), formats((0, 2, 8), trim=1))
    with patch.object(quantize, "triton_serves", return_value=False):
        changed = change(pools)
    assert_read_by_random_lines(changed, 3)


def test_what_kernels_need_beside_the_rows_is_counted():
    pools = pooled(random_states(3, 70, 64), 1, random_widths(3, 70), formats(trim=1))
    assert pools.held_bytes() == sum(tensor.nbytes for tensor in pools.tensors())
    index = sum(4 * (pool.capacity + 3 + 1) + 8 * pool.capacity // ROWS for pool in pools._pools.values())
    assert pools.used_bytes()["widths"] == 3 * 70 + index


def test_pools_made_in_the_reference_are_read_by_kernels_after_it():
    with backend.reference_only():
        pools = pooled(random_states(2, 70, 64), 1, random_widths(2, 70), formats(trim=1))
        with patch.object(kernels, "scores") as scores, patch.object(kernels, "mix") as mix:
            assert_read_by_random_lines(pools, 3, 1e-6)
    assert not scores.called and not mix.called
    with patch.object(kernels, "scores", wraps=kernels.scores) as scores:
        assert_read_by_random_lines(pools, 3)
    assert scores.called


def test_pools_without_the_index_of_kernels_are_read_by_torch():
    with patch.object(backend, "triton_problem", return_value="another device"):
        pools = pooled(random_states(2, 70, 64), 1, random_widths(2, 70), formats(trim=1))
    with patch.object(kernels, "scores") as scores, patch.object(kernels, "mix") as mix:
        assert_read_by_random_lines(pools, 3, 1e-6)
    assert not scores.called and not mix.called


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "message"),
    [
        (2, 12, torch.float32, "no kernel for head_dim=12, heads in a row: 2, bits: 2"),
        (1, 9, torch.float32, "no kernel for head_dim=9, heads in a row: 1, bits: 16"),
        (1, 64, torch.float64, "no kernel for attention in torch.float64"),
    ],
    ids=["heads", "dim", "dtype"],
)
def test_what_no_kernel_serves_is_read_by_torch_and_said_once(heads, dim, dtype, message):
    pools = pooled(random_states(1, 40, heads * dim), heads, random_widths(1, 40), formats(trim=1))
    query, weights = (random_lines(pools, 2, length).to(dtype) for length in (dim, 40))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_read(pools, query, weights, 1e-5)
    assert len(said) == 1 and message in str(said[0].message)


def test_gradients_are_left_to_torch():
    pools = pooled(random_states(1, 40, 64), 1, random_widths(1, 40, (2, 16)), formats())
    query = random_lines(pools, 2, 64).requires_grad_()
    with pytest.warns(UserWarning, match="no kernel for gradients"):
        pools.scores(query).sum().backward()
    torch.testing.assert_close(query.grad.double(), dense(pools).sum(2, keepdim=True).expand(query.shape))
    with torch.no_grad():
        pools.scores(query)
