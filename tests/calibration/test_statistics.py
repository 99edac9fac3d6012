"""Ranges are exact percentiles, densities exact histograms, and both reproduce a worked KVQuant calibration."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cachequant.core.calibration import fitted_tables, normalised_tables
from cachequant.core.calibration.kmeans import normal_float, weighted_kmeans
from cachequant.core.calibration.statistics import (
    BINS,
    Density,
    Extremes,
    Statistics,
    bin_centres,
    q_norm,
    static_grid,
)
from cachequant.kernels.format import Format
from cachequant.kernels.quantize import FLOAT16_MAX, Tables, decode, encode, normalise

STATIC = Format(codes="codebook", bits=2, scale="static")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the worked example: 8 tokens, 4 channels, a quarter of the numbers outliers -------------------------------------


def example() -> tuple[Tensor, Tensor]:
    """Activations and Fisher information `[tokens, channels]`, float64."""
    t, c = torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij")
    return (((37 * t + 11 * c + 5 * t * c) % 23 - 11) * (c + 1) / 8).double(), (1 + (13 * t + 7 * c) % 5).double()


def thresholds(rows: Tensor) -> tuple[Tensor, Tensor]:
    """low and high `[channels]` of `rows [tokens, channels]`, by our streaming percentiles."""
    extremes = Extremes(len(rows), share=0.25)
    extremes.add(rows[None, None])
    low, high = extremes.bounds()
    return low[0], high[0]


def normalised_example(axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised numbers, which of them are inliers, Fisher information and squared scales, `[tokens, channels]`.

    axis: 0 for keys (a range per channel), 1 for values (a range per token).
    """
    states, fisher = example()
    low, high = (bound.double().unsqueeze(axis) for bound in thresholds(states if axis == 0 else states.T))
    normalised = (states - (high + low) / 2) / ((high - low) / 2)
    return normalised, normalised.abs() <= 1, fisher, (((high - low) / 2) ** 2).expand_as(states)


def test_worked_example_key_thresholds():
    low, high = thresholds(example()[0])
    assert high.tolist() == [0.5625, 1.875, -1.125, 3.3125]
    assert low.tolist() == [-1.265625, -1.34375, -3.796875, -3.3125]
    grid = static_grid(low, high, STATIC)
    assert grid.zero.tolist() == [-0.3515625, 0.265625, -2.4609375, 0]
    assert grid.scale.tolist() == [0.9140625, 1.609375, 1.3359375, 3.3125]


def test_worked_example_key_outliers_and_normalised_row():
    normalised, inlier, _, _ = normalised_example(0)
    outliers = [(0, 0), (0, 2), (1, 2), (2, 1), (2, 3), (3, 0), (3, 1), (6, 3)]
    assert [tuple(place) for place in (~inlier).nonzero().tolist()] == outliers
    assert_close(normalised[4], torch.tensor([0.247863, 0.922330, -0.403509, 0.0]).double(), atol=5e-7, rtol=0)


def test_worked_example_value_thresholds():
    low, high = thresholds(example()[0].T)
    assert high.tolist() == [2.578125, 1.703125, 3.15625, 2.09375, 1.09375, 2.15625, 0.21875, -0.859375]
    assert low.tolist() == [-1.046875, -2.953125, -3.09375, -3.234375, -1.921875, -2.109375, -4.28125, -2.265625]
    assert (~normalised_example(1)[1]).sum() == 16


@pytest.mark.parametrize(
    ("axis", "gain", "offset", "levels"),
    [
        pytest.param(0, 1.049598, -0.014392, [-0.882610, -0.214743, 0.254177, 0.883147], id="keys"),
        pytest.param(1, 1.087187, 0.009017, [-0.739192, -0.280656, 0.302074, 0.570842], id="values"),
    ],
)
def test_worked_example_q_norm(axis, gain, offset, levels):
    normalised, inlier, fisher, _ = normalised_example(axis)
    points = normalised[inlier]
    codebook = weighted_kmeans(points, fisher[inlier], 4)
    found = q_norm(points, torch.ones_like(points), codebook)
    assert found == pytest.approx((gain, offset), abs=2e-6)
    assert_close(found[0] * codebook + found[1], torch.tensor(levels), atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    ("axis", "weights", "levels"),
    [
        pytest.param(0, "equal", [-0.860080, -0.237217, 0.286331, 0.861841], id="keys"),
        pytest.param(0, "fisher", [-0.827191, -0.190884, 0.255878, 0.855127], id="keys-fisher"),
        pytest.param(0, "fisher-scaled", [-0.810850, -0.099849, 0.263445, 0.819093], id="keys-fisher-scaled"),
        pytest.param(1, "fisher", [-0.688206, -0.266443, 0.269555, 0.516770], id="values-fisher"),
        pytest.param(1, "fisher-scaled", [-0.683800, -0.230056, 0.350345, 0.614690], id="values-fisher-scaled"),
    ],
)
def test_worked_example_codebooks_from_a_density(axis, weights, levels):
    # through the histogram: numbers are known to half a bin
    normalised, _, fisher, squares = normalised_example(axis)
    density = Density()
    density.add(normalised, squares.sqrt(), torch.ones_like(normalised, dtype=torch.bool), fisher)
    statistics = Statistics(density.mass.float())
    fit = weighted_kmeans(bin_centres(), statistics.mass(weights), 4)
    assert_close(fit, torch.tensor(levels), atol=1 / BINS, rtol=0)
    tables = fitted_tables(statistics, Format(codes="codebook", bits=2), "key", "nuq", weights)
    assert torch.equal(tables.codebook, Tables(codebook=fit).codebook)


# ---- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.25])
@pytest.mark.parametrize("tokens", [2, 3, 63, 400])
def test_ranges_are_numpys_percentiles_over_all_windows(tokens, share):
    states = random(3, 2, tokens, 5) * 10
    extremes = Extremes(3 * tokens, share)
    for window in states.split(1):
        extremes.add(window)
    low, high = extremes.bounds()
    rows = states.permute(1, 3, 0, 2).flatten(2).double().numpy()
    ends = [100 * share / 2, 100 * (1 - share / 2)]
    expected = torch.from_numpy(np.percentile(rows, ends, axis=-1)).float()
    # computed in float32 before both are rounded to float16: neighbours where they fall between two
    assert_close(torch.stack([low, high]), expected.half().float(), rtol=2**-10, atol=1e-6)
    assert (torch.stack([low, high]) == expected.half().float()).float().mean() > 0.9


def test_ranges_of_no_outliers_are_the_smallest_and_the_largest_number():
    states = random(1, 2, 100, 8).half().float()
    extremes = Extremes(100, 0.0)
    extremes.add(states)
    low, high = extremes.bounds()
    assert torch.equal(low, states[0].amin(1))
    assert torch.equal(high, states[0].amax(1))


def test_ranges_do_not_depend_on_how_tokens_are_cut_or_ordered():
    states = random(1, 2, 300, 4)
    ranges = []
    for pieces in (states.split(300, 2), states.split(7, 2), states.flip(2).split(50, 2)):
        extremes = Extremes(300, 0.04)
        for piece in pieces:
            extremes.add(piece)
        ranges.append(extremes.bounds())
    for low, high in ranges[1:]:
        assert torch.equal(low, ranges[0][0])
        assert torch.equal(high, ranges[0][1])


def test_ranges_go_on_from_what_was_kept():
    states = random(1, 2, 90, 4)
    whole, first = Extremes(90, 0.1), Extremes(90, 0.1)
    whole.add(states)
    first.add(states[:, :, :40])
    second = Extremes(90, 0.1, first.kept)
    second.add(states[:, :, 40:])
    assert all(torch.equal(a, b) for a, b in zip(whole.bounds(), second.bounds(), strict=True))


def test_ranges_keep_only_the_numbers_that_percentiles_need():
    extremes = Extremes(10_000, 0.01)
    for seed in range(10):
        extremes.add(random(1, 1, 1000, 3, seed=seed))
    assert all(kept.shape == (1, 3, 51) for kept in extremes.kept)


def test_ranges_are_float16_and_finite():
    extremes = Extremes(2, 0.0)
    extremes.add(torch.tensor([[[[1e9, 0.1]], [[-1e9, 0.3]]]]).transpose(1, 2))
    low, high = extremes.bounds()
    assert high[0, 0] == FLOAT16_MAX
    assert low[0, 0] == -FLOAT16_MAX
    assert torch.equal(high, high.half().float())


def test_ranges_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no tokens were added"):
        Extremes(4, 0.0).bounds()


# ---- densities -------------------------------------------------------------------------------------------------------


def test_a_density_is_a_histogram_of_what_lies_on_the_grids():
    normalised, width, fisher = random(2, 2, 50, 8) * 0.6, random(2, 2, 50, 8, seed=1).abs() + 0.1, random(2, 2, 50, 8)
    fisher = fisher.square()
    keep = torch.arange(50)[None, None, :, None] >= 3
    density = Density()
    density.add(normalised, width, keep, fisher)
    inside = (keep & (normalised.abs() <= 1)).numpy()
    points = normalised.numpy()[inside]
    assert (normalised.abs() > 1).any()
    for row, weights in zip(density.mass, (None, fisher, fisher * width**2), strict=True):
        weights = None if weights is None else weights.double().numpy()[inside]
        expected, _ = np.histogram(points, BINS, (-1, 1), weights=weights)
        assert_close(row, torch.from_numpy(expected).double(), rtol=1e-5, atol=1e-9)


def test_a_density_without_gradients_counts_every_number_alike():
    normalised = random(1, 1, 9, 4).clamp(-0.9, 0.9)
    density = Density()
    density.add(normalised, torch.full_like(normalised, 3.0), torch.ones_like(normalised, dtype=torch.bool))
    assert torch.equal(density.mass[0], density.mass[1])
    assert torch.equal(density.mass[2], 9 * density.mass[0])


def test_densities_of_windows_add_up():
    pieces = [random(1, 1, 9, 4, seed=seed).clamp(-1, 1) for seed in range(3)]
    whole, parts = Density(), Density()
    for into, adding in ((whole, [torch.cat(pieces, 2)]), (parts, pieces[::-1])):
        for piece in adding:
            into.add(piece, torch.ones_like(piece), torch.ones_like(piece, dtype=torch.bool))
    assert torch.equal(whole.mass, parts.mass)


def test_numbers_without_a_range_and_ends_beyond_it_by_rounding():
    normalised = torch.tensor([0.0, -1.0005, 1.0005, 1.0, -1.0, 1.01]).view(1, 1, 1, 6)
    width = torch.tensor([0.0, 1, 1, 1, 1, 1]).view(1, 1, 1, 6)
    density = Density()
    density.add(normalised, width, torch.ones_like(normalised, dtype=torch.bool))
    mass = density.mass[0]
    assert mass[0] == mass[-1] == 2
    assert mass.sum() == 4


@pytest.mark.parametrize("codes", ["affine", "codebook"])
@pytest.mark.parametrize("scale", ["token", "channel", "static"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normalised_numbers_fill_the_range_from_end_to_end(codes, scale, bits):
    fmt = Format(codes=codes, bits=bits, scale=scale)
    states = random(2, 2, 64, 32) * 3 + 1
    tables = static_grid(states.amin((0, 2)), states.amax((0, 2)), fmt) if scale == "static" else Tables()
    normalised, width = normalise(states, fmt, "key", 32, None, tables)
    assert normalised.shape == width.shape == states.shape
    # scales are stored as float16
    assert normalised.abs().max() == pytest.approx(1, abs=2e-3)
    assert normalised.amin() == pytest.approx(-1, abs=2e-3)
    # what is left is the middle of each number's range, the same wherever the range is
    middle = (states - normalised * width).unflatten(2, (-1, 32))
    shared = {"token": (4,), "channel": (3,), "static": (0, 2, 3)}[scale]
    assert_close(middle, middle.mean(shared, keepdim=True).expand_as(middle), rtol=0, atol=2e-2)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_statistics_without_ranges_cannot_make_a_static_grid():
    with pytest.raises(ValueError, match="measured no channel ranges"):
        Statistics(torch.ones(3, BINS)).grid(STATIC)
    assert not Statistics(torch.ones(3, BINS)).grid(Format()).tensors()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("codes", ["affine", "codebook"])
def test_static_grids_span_their_range(bits, codes):
    fmt = Format(codes=codes, bits=bits, scale="static")
    low, high = torch.tensor([[-1.0, 2.0, 5.0]]), torch.tensor([[1.0, 3.0, 5.0]])
    grid = static_grid(low, high, fmt)
    tables = Tables(torch.linspace(-1, 1, 2**bits) if codes == "codebook" else None, grid.scale, grid.zero)
    states = torch.cat([low, high]).repeat(16, 1)[None, None]
    packed = encode(states, fmt, "key", 32, tables=tables)
    assert_close(decode(packed, fmt, "key", 3, 32, tables), states)


@pytest.mark.parametrize("weights", ["equal", "fisher", "fisher-scaled"])
def test_without_mass_where_it_counts_every_number_counts_alike(weights):
    mass = torch.zeros(3, BINS)
    mass[0, [3, 900, 1500, 2000]] = 1.0
    tables = fitted_tables(Statistics(mass), Format(codes="codebook", bits=2), "key", "nuq", weights)
    fit = Tables(codebook=bin_centres()[[3, 900, 1500, 2000]].float()).codebook
    assert_close(tables.codebook, fit, atol=1e-6, rtol=0)


def test_without_any_mass_the_codebook_is_normal_float():
    tables = fitted_tables(Statistics(torch.zeros(3, BINS)), Format(codes="codebook", bits=3), "key", "nuq", "fisher")
    assert torch.equal(tables.codebook, Tables(codebook=normal_float(3)).codebook)
    assert normalised_tables(Statistics(torch.zeros(3, BINS)), Format(codes="codebook", bits=3), tables) is tables


def test_datatypes_choose_the_codebook():
    statistics, fmt = Statistics(torch.ones(3, BINS)), Format(codes="codebook", bits=2)
    normal = Tables(codebook=normal_float(2)).codebook
    assert torch.equal(fitted_tables(statistics, fmt, "key", "nf", "equal").codebook, normal)
    assert fitted_tables(statistics, Format(bits=2), "key", "int", "equal").codebook is None
    uniform = fitted_tables(statistics, fmt, "key", "nuq", "equal").codebook
    # 1.5 / 126 is a step
    assert_close(uniform, torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1.5 / 252 + 1e-3, rtol=0)


@pytest.mark.parametrize(("side", "outliers", "kept"), [("key", 2, True), ("key", 0, False), ("value", 2, False)])
@pytest.mark.parametrize("datatype", ["nuq", "nf", "int"])
def test_tables_carry_sensitivities_where_slots_of_keys_are_given_by_them(datatype, side, outliers, kept):
    fmt = Format(codes="affine" if datatype == "int" else "codebook", bits=2, outliers=outliers)
    statistics = Statistics(torch.ones(3, BINS), sensitivity=torch.rand(2, 64))
    tables = fitted_tables(statistics, fmt, side, datatype, "equal")
    assert (tables.sensitivity is statistics.sensitivity) == kept


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("scale", ["token", "channel", "static"])
@pytest.mark.parametrize("datatype", ["nuq", "nf", "int"])
def test_q_norm_decodes_with_the_moments_of_the_original(datatype, scale, side):
    fmt = Format(codes="affine" if datatype == "int" else "codebook", bits=2, scale=scale)
    states = random(2, 2, 128, 64).exp()
    grid = static_grid(states.amin((0, 2)), states.amax((0, 2)), fmt) if scale == "static" else Tables()
    normalised, width = normalise(states, fmt, side, 32, None, grid)
    density = Density()
    density.add(normalised, width, torch.ones_like(normalised, dtype=torch.bool))
    low, high = (states.amin((0, 2)), states.amax((0, 2))) if scale == "static" else (None, None)
    statistics = Statistics(density.mass.float(), low, high)
    plain = fitted_tables(statistics, fmt, side, datatype, "equal")
    tables = normalised_tables(statistics, fmt, plain)
    packed = encode(states, fmt, side, 32, tables=tables)
    assert torch.equal(packed["codes"], encode(states, fmt, side, 32, tables=plain)["codes"])
    moments = []
    for each in (states, decode(packed, fmt, side, 64, 32, tables), decode(packed, fmt, side, 64, 32, plain)):
        relative = (each - (states - normalised * width)) / width
        moments.append(torch.stack([relative.mean(), relative.std()]))
    assert_close(moments[1], moments[0], atol=2e-3, rtol=1e-2)
    # else nothing was proven
    assert (moments[2] - moments[0]).abs().max() > 1e-2


def test_q_norm_of_a_single_level_keeps_its_gain():
    assert q_norm(torch.tensor([0.5, 0.6]), torch.ones(2), torch.tensor([0.55, 0.55])) == pytest.approx((1.0, 0.0))
