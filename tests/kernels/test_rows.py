"""Rows of mixed widths: the paper's and the repository's grids, exactness, cutting down, and dot products."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cachequant.kernels.format import Format, MixedFormat
from cachequant.kernels.packing import unpack
from cachequant.kernels.rows import (
    decode_rows,
    encode_rows,
    recode_rows,
    row_bytes,
    row_ends,
    row_mix,
    row_scores,
    state_ends,
)

HALF = 2.0**-11  # relative rounding of float16

WIDTHS = [2, 3, 4, 8, 16]
LENGTHS = [8, 64, 80, 128, 512]
GRIDS = ["ends", "midpoint", "mean"]
NARROWER = [(wide, narrow) for wide in WIDTHS for narrow in WIDTHS if narrow < wide]


def row_format(width: int, grid: str = "midpoint", trim: int = 0) -> Format:
    if width == 16:
        return Format(codes="exact")
    return Format(bits=width, grid=grid, trim=trim, outliers=2 * trim)


def random_rows(count: int, numbers: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, numbers, generator=generator)
    # rows of very different size and offset, and a spike in each
    states = states * torch.logspace(-1, 1, count)[:, None] + torch.linspace(-2, 3, count)[:, None]
    spikes = torch.randint(numbers, (count, 1), generator=generator)
    return states.scatter(-1, spikes, 40.0)


def round_trip(states: Tensor, fmt: Format) -> Tensor:
    return decode_rows(encode_rows(states, fmt), fmt, states.shape[-1], torch.float64)


def one_step(states: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The step of each row's grid, and how far float16 scale and zero may be off: `[n, 1]` float64."""
    low, high = (end.double()[:, None] for end in state_ends(states, fmt.trim))
    return (high - low) / 2**fmt.bits, HALF * (high - low + torch.maximum(high.abs(), low.abs()))


parametrize_widths = pytest.mark.parametrize("width", WIDTHS, ids="{}bit".format)
parametrize_packed_widths = pytest.mark.parametrize("width", WIDTHS[:-1], ids="{}bit".format)
parametrize_grids = pytest.mark.parametrize("grid", GRIDS)
parametrize_trims = pytest.mark.parametrize("trim", [0, 1], ids=["plain", "outliers"])


# ---- worked example: the quantizers of paper and repository on one row ----------------------------------------------

EXAMPLE = torch.tensor([[-1, -0.5, -0.2, 0, 0.1, 0.4, 0.9, 3]])


@pytest.mark.parametrize(
    ("grid", "bits", "error"),
    [
        ("midpoint", 2, 0.14625),
        ("midpoint", 3, 0.04),
        ("midpoint", 4, 0.00875),
        ("mean", 2, 0.435469),
        ("mean", 3, 0.187031),
        ("mean", 4, 0.108125),
    ],
)
def test_worked_example_errors_are_those_of_paper_and_repository(grid, bits, error):
    back = round_trip(EXAMPLE, row_format(bits, grid))
    assert float((back - EXAMPLE).square().mean()) == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize(
    ("grid", "levels"),
    [
        ("midpoint", [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 2.5]),
        ("mean", [-0.6625, -0.6625, -0.6625, 0.3375, 0.3375, 0.3375, 1.3375, 1.3375]),
    ],
)
def test_worked_example_levels_of_two_bits(grid, levels):
    assert_close(round_trip(EXAMPLE, row_format(2, grid))[0], torch.tensor(levels).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "levels"),
    [
        # range -0.5 to 0.9 without them
        ("midpoint", [-1, -0.325, -0.325, 0.025, 0.025, 0.375, 0.725, 3]),
        ("mean", [-1, -0.583333, -0.233333, 0.116667, 0.116667, 0.466667, 0.466667, 3]),
    ],
)
def test_worked_example_outliers_stay_exact_and_out_of_range_and_mean(grid, levels):
    fmt = row_format(2, grid, trim=1)
    rows = encode_rows(EXAMPLE, fmt)
    assert rows["outlier_index"].tolist() == [[0, 7]]
    assert_close(decode_rows(rows, fmt, 8)[0], torch.tensor(levels), rtol=0, atol=1e-3)


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", LENGTHS)
@parametrize_packed_widths
@parametrize_trims
def test_numbers_come_back_to_half_a_cell(width, trim, numbers):
    states = random_rows(7, numbers)
    fmt = row_format(width, trim=trim)
    step, slack = one_step(states, fmt)
    inside = torch.ones_like(states, dtype=torch.bool)
    if trim:
        inside.scatter_(-1, encode_rows(states, fmt)["outlier_index"].long(), False)
    error = (round_trip(states, fmt) - states.double()).abs()
    assert (error <= step / 2 + slack)[inside].all()
    # else the bound would prove nothing
    assert (error / step)[inside].max() > 0.3


@pytest.mark.parametrize("numbers", LENGTHS)
def test_numbers_in_16_bits_lose_nothing_but_what_float16_does(numbers):
    states = random_rows(7, numbers)
    assert torch.equal(round_trip(states, row_format(16)), states.half().double())


@pytest.mark.parametrize("numbers", LENGTHS)
@parametrize_packed_widths
def test_levels_around_the_mean_reach_as_far_up_as_down_but_for_one(width, numbers):
    states = random_rows(7, numbers)
    step, slack = one_step(states, row_format(width, "mean"))
    mean = states.double().mean(-1, keepdim=True)
    half = 2 ** (width - 1)
    expected = mean + step * ((states - mean) / step).round().clamp(-half, half - 1)
    error = (round_trip(states, row_format(width, "mean")) - expected).abs()
    # a number halfway between two levels may take either
    assert (error <= 2 * slack).double().mean() >= 0.9
    assert (error <= step + 2 * slack).all()


@parametrize_packed_widths
@pytest.mark.parametrize("grid", ["midpoint", "mean"])
def test_outliers_come_back_exact_to_half_precision(width, grid):
    states = random_rows(9, 128)
    ends = torch.cat([states.topk(2, largest=False).indices, states.topk(2).indices], -1)
    back = round_trip(states, row_format(width, grid, trim=2))
    assert_close(back.gather(-1, ends), states.gather(-1, ends).double(), rtol=4 * HALF, atol=1e-3)


@parametrize_widths
@parametrize_grids
@parametrize_trims
def test_constant_rows_come_back_to_half_precision(width, grid, trim):
    states = torch.tensor([0.0, 3.1, -1000.3, 1e-9])[:, None].expand(-1, 64)
    back = round_trip(states, row_format(width, grid, trim))
    assert ((back - states.double()).abs() <= HALF * states.abs()[:, :1] + 2**-24).all()
    assert back[0].eq(0).all()


@parametrize_widths
@parametrize_trims
def test_no_number_of_a_constant_row_has_two_slots(width, trim):
    states = torch.full((2, 8), 3.1)
    states[1, 5] = 9.0
    rows = encode_rows(states, row_format(width, trim=3 * trim))
    for slots in rows.get("outlier_index", torch.empty(0)).tolist():
        assert len(set(slots)) == len(slots)


@parametrize_widths
@parametrize_grids
@parametrize_trims
def test_huge_numbers_saturate_and_stay_finite(width, grid, trim):
    states = random_rows(3, 64) * torch.tensor([[1.0], [1e5], [1e30]])
    back = round_trip(states, row_format(width, grid, trim))
    assert back.isfinite().all()
    # rows do not know of one another
    assert torch.equal(back[:1], round_trip(states[:1], row_format(width, grid, trim)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@parametrize_packed_widths
@parametrize_trims
def test_other_dtypes_are_encoded_as_their_float32_values(width, trim, dtype):
    states = random_rows(5, 80).to(dtype)
    fmt = row_format(width, trim=trim)
    expected, actual = encode_rows(states.float(), fmt), encode_rows(states, fmt)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_16_bits_have_the_models_dtype_or_float16(dtype):
    states = random_rows(5, 80).to(dtype)
    rows = encode_rows(states, row_format(16))
    assert rows["exact"].dtype == (dtype if dtype.itemsize == 2 else torch.float16)
    assert_close(decode_rows(rows, row_format(16), 80, torch.float64), states.double(), rtol=HALF, atol=0)


@parametrize_widths
@parametrize_grids
@parametrize_trims
def test_there_may_be_no_rows(width, grid, trim):
    fmt = row_format(width, grid, trim)
    none, some = encode_rows(torch.empty(0, 80), fmt), encode_rows(torch.ones(2, 80), fmt)
    assert {name: (t.dtype, t.shape[1:]) for name, t in none.items()} == {
        name: (t.dtype, t.shape[1:]) for name, t in some.items()
    }
    assert decode_rows(none, fmt, 80).shape == (0, 80)
    assert row_ends(none, fmt, trim)[0].shape == (0,)
    if width > 2:
        assert recode_rows(none, fmt, row_format(2, grid, trim), 80)["codes"].shape == (0, 5)


@pytest.mark.parametrize("numbers", LENGTHS)
@parametrize_widths
@parametrize_trims
def test_bytes_of_a_row_are_those_of_its_tensors(width, trim, numbers):
    fmt = row_format(width, trim=trim)
    rows = encode_rows(random_rows(3, numbers), fmt)
    assert 3 * sum(row_bytes(fmt, numbers).values()) == sum(tensor.nbytes for tensor in rows.values())


# ---- cutting down ----------------------------------------------------------------------------------------------------


def check_same_as_direct(narrowed: dict[str, Tensor], states: Tensor, to: Format, differing: float) -> None:
    """Check rows that were cut down to `to` against what encoding the original `states` gives.

    differing: the share of codes that may be another one.
    """
    numbers = states.shape[-1]
    direct = encode_rows(states, to)
    codes = [unpack(rows["codes"], to.bits, numbers) for rows in (narrowed, direct)]
    assert (codes[0] != codes[1]).double().mean() <= differing
    difference = (decode_rows(narrowed, to, numbers, torch.float64) - decode_rows(direct, to, numbers)).abs()
    step, slack = one_step(states, to)
    assert (difference <= step + 2 * slack).all()
    if to.outliers:
        assert torch.equal(narrowed["outlier_index"], direct["outlier_index"])
        back = decode_rows(narrowed, to, numbers).gather(-1, direct["outlier_index"].long())
        exact = states.gather(-1, direct["outlier_index"].long())
        assert_close(back, exact, rtol=8 * HALF, atol=2e-3)


@pytest.mark.parametrize(("wide", "narrow"), NARROWER)
@parametrize_trims
def test_cutting_down_a_midpoint_grid_is_encoding_with_fewer_bits(wide, narrow, trim):
    states = random_rows(40, 128)
    fmt, to = row_format(wide, trim=trim), row_format(narrow, trim=trim)
    narrowed = recode_rows(encode_rows(states, fmt), fmt, to, 128)
    # zero points are rounded to float16 each, and numbers of 16 bits are as well: near the edge of a cell codes differ
    check_same_as_direct(narrowed, states, to, 0.1 if (wide, narrow) == (16, 8) else 0.01)


@parametrize_trims
def test_cutting_down_step_by_step_is_cutting_down_at_once(trim):
    states = random_rows(40, 128)
    formats = [row_format(width, trim=trim) for width in (8, 4, 3, 2)]
    rows = encode_rows(states, formats[0])
    at_once = recode_rows(rows, formats[0], formats[-1], 128)
    for fmt, to in pairwise(formats):
        rows = recode_rows(rows, fmt, to, 128)
    assert torch.equal(rows["codes"], at_once["codes"])
    assert_close(rows["scales"], at_once["scales"], rtol=4 * HALF, atol=40 * HALF)
    check_same_as_direct(rows, states, formats[-1], 0.01)


@parametrize_trims
def test_constant_rows_survive_cutting_down(trim):
    states = torch.tensor([3.1, -1000.3])[:, None].expand(-1, 8)
    rows = encode_rows(states, row_format(8, trim=3 * trim))
    for wide, narrow in ((8, 4), (4, 3), (3, 2)):
        rows = recode_rows(rows, row_format(wide, trim=3 * trim), row_format(narrow, trim=3 * trim), 8)
    back = decode_rows(rows, row_format(2, trim=3 * trim), 8)
    assert ((back - states).abs() <= HALF * states.abs()).all()


@pytest.mark.parametrize(("wide", "narrow"), NARROWER)
@pytest.mark.parametrize("grid", ["ends", "mean"])
@parametrize_trims
def test_other_grids_are_made_anew_for_the_decoded_numbers(wide, narrow, grid, trim):
    states = random_rows(5, 64)
    fmt, to = row_format(wide, grid, trim), row_format(narrow, grid, trim)
    rows = encode_rows(states, fmt)
    expected, actual = encode_rows(decode_rows(rows, fmt, 64), to), recode_rows(rows, fmt, to, 64)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_rows_that_get_other_outliers_are_made_anew():
    states = random_rows(5, 64)
    fmt, to = row_format(8, trim=2), row_format(4, trim=1)
    narrowed = recode_rows(encode_rows(states, fmt), fmt, to, 64)
    assert narrowed["outlier_index"].shape == (5, 2)
    step, slack = one_step(states, to)
    assert ((decode_rows(narrowed, to, 64) - states).abs() <= step + slack).all()


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_ends_of_states_leave_out_as_many_as_are_trimmed():
    states = torch.tensor([[5.0, -7, 1, 2, 3, 100, -3, 2]])
    assert [end.item() for end in state_ends(states, 0)] == [-7, 100]
    assert [end.item() for end in state_ends(states, 1)] == [-3, 5]
    assert [end.item() for end in state_ends(states.half(), 2)] == [1, 3]


@parametrize_widths
@pytest.mark.parametrize("grid", ["ends", "midpoint"])
@parametrize_trims
def test_rows_know_the_ends_of_the_range_they_were_encoded_with(width, grid, trim):
    states = random_rows(9, 64)
    fmt = row_format(width, grid, trim)
    reach = 8 * HALF * states.abs().amax(-1)
    for ours, theirs in zip(row_ends(encode_rows(states, fmt), fmt, trim), state_ends(states, trim), strict=True):
        assert ((ours - theirs).abs() <= reach).all()


@parametrize_widths
@parametrize_trims
def test_rows_around_a_mean_know_how_far_apart_the_ends_are(width, trim):
    states = random_rows(9, 64)
    fmt = row_format(width, "mean", trim)
    low, high = row_ends(encode_rows(states, fmt), fmt, trim)
    expected = state_ends(states, trim)[1] - state_ends(states, trim)[0]
    assert_close(high - low, expected, rtol=2 * HALF, atol=8 * HALF * 40)


@pytest.mark.parametrize(("wide", "narrow"), [(wide, narrow) for wide, narrow in NARROWER if wide < 16])
@parametrize_trims
def test_cutting_down_a_midpoint_grid_keeps_the_ends(wide, narrow, trim):
    fmt, to = row_format(wide, trim=trim), row_format(narrow, trim=trim)
    rows = encode_rows(random_rows(9, 64), fmt)
    before, after = row_ends(rows, fmt, trim), row_ends(recode_rows(rows, fmt, to, 64), to, trim)
    assert_close(torch.stack(after), torch.stack(before), rtol=2 * HALF, atol=0.03)


# ---- dot products ----------------------------------------------------------------------------------------------------


def blocks_of_rows(fmt: Format, heads: int, dim: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three blocks of five rows, and what they decode to `[blocks, heads, rows, dim]` float64."""
    states = random_rows(15, heads * dim)
    states[3] = 0
    states[4] = 2.5
    states[7] = 0
    states[7, 2] = 30.0  # nothing but an outlier
    rows = {name: tensor.unflatten(0, (3, 5)) for name, tensor in encode_rows(states, fmt).items()}
    return rows, decode_rows(rows, fmt, heads * dim, torch.float64).unflatten(-1, (heads, dim)).transpose(1, 2)


@pytest.mark.parametrize("heads", [1, 3])
@parametrize_widths
@parametrize_grids
@parametrize_trims
def test_scores_are_products_with_the_decoded_rows(width, grid, trim, heads):
    fmt = row_format(width, grid, trim)
    rows, dense = blocks_of_rows(fmt, heads, 24)
    query = torch.randn(3, heads, 4, 24, generator=torch.Generator().manual_seed(1))
    expected = query.double() @ dense.transpose(-1, -2)
    assert_close(row_scores(query, rows, fmt).double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(row_scores(query.double(), rows, fmt), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 3])
@parametrize_widths
@parametrize_grids
@parametrize_trims
def test_mixes_are_weighted_sums_of_the_decoded_rows(width, grid, trim, heads):
    fmt = row_format(width, grid, trim)
    rows, dense = blocks_of_rows(fmt, heads, 24)
    weights = torch.rand(3, heads, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = weights.double() @ dense
    assert_close(row_mix(weights, rows, fmt, 24).double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(row_mix(weights.double(), rows, fmt, 24), expected, rtol=1e-10, atol=1e-10)


@parametrize_packed_widths
@pytest.mark.parametrize("grid", ["midpoint", "mean"])
def test_a_row_of_nothing_but_outliers_is_read_exactly(width, grid):
    states = torch.zeros(1, 16)
    states[0, 3], states[0, 11] = -20.0, 7.0
    fmt = row_format(width, grid, trim=1)
    rows = {name: tensor[None] for name, tensor in encode_rows(states, fmt).items()}
    assert rows["scales"][..., 0].eq(0).all()
    assert torch.equal(row_scores(torch.eye(16)[None, None], rows, fmt)[0, 0, :, 0], states[0])
    assert torch.equal(row_mix(torch.ones(1, 1, 1, 1), rows, fmt, 16)[0, 0], states)


# ---- formats that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "midpoint", "codes": "codebook"}, "needs codes='affine'"),
        ({"grid": "mean", "scale": "static"}, "scale='token' or 'channel'"),
        ({"grid": "mean", "symmetric": True}, "symmetric=False"),
        ({"grid": "midpoint", "outliers": 2}, "outliers = 2 \\* trim, got 2 and 0"),
        ({"grid": "midpoint", "outliers": 2, "trim": 1, "group": 16}, "no group"),
        ({"grid": "midpoint", "outliers": 2, "trim": 1, "scale": "channel"}, "one scale per token"),
    ],
    ids=str,
)
def test_grids_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Format(**settings)


@pytest.mark.parametrize(
    "fmt",
    [
        Format(codes="codebook"),
        Format(scale="channel"),
        Format(group=16),
        Format(rotation="hadamard"),
        Format(symmetric=True),
        Format(rope="pre"),
    ],
    ids=["codebook", "channel", "group", "rotated", "symmetric", "pre-rope"],
)
def test_rows_that_do_not_stand_for_themselves_are_refused(fmt):
    with pytest.raises(ValidationError, match="one scale and zero per token"):
        MixedFormat(key=(fmt,), value=(Format(),))


@pytest.mark.parametrize("widths", [(4, 2), (4, 4), (16, 8)], ids=str)
def test_widths_must_ascend(widths):
    with pytest.raises(ValidationError, match="value: widths must ascend, got"):
        MixedFormat(key=(Format(),), value=tuple(row_format(width) for width in widths))


@pytest.mark.parametrize(
    ("heads", "fmt", "dims", "message"),
    [
        ("apart", row_format(4, trim=4), (8, 64), "key: 8 outlier slots and a trim of 4 do not fit a row of 8"),
        ("together", row_format(4, trim=8), (64, 4), "value: 16 outlier slots and a trim of 8 do not fit a row of 16"),
        ("together", row_format(4, trim=1), (64, 16384), "value: 16 bits do not say where in a row of 65536"),
    ],
    ids=["key", "value", "index"],
)
def test_rows_too_short_or_too_long_for_their_slots_are_refused(heads, fmt, dims, message):
    with pytest.raises(ValueError, match=message):
        MixedFormat(key=(fmt,), value=(fmt,), heads=heads).require_fitting(*dims, 4)
