"""Codebooks are the global optimum, whatever the order, scale and weights of the points."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cachequant.core.calibration.kmeans import normal_float, objective, weighted_kmeans


def random_points(seed: int, count: int, decades: float = 1.0) -> tuple[Tensor, Tensor]:
    """Normal points, `[count]` float32, and weights between 10**-decades and 1, `[count]` float64."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, generator=generator)
    return points, 10 ** (-decades * torch.rand(count, generator=generator, dtype=torch.float64))


def weighted_mean(points: Tensor, weights: Tensor) -> Tensor:
    return (weights * points).sum() / weights.sum()


def calibration_example(axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inliers of a worked KVQuant calibration, normalised, their Fisher information, and their squared scales.

    axis: 0 for keys (a scale per channel), 1 for values (a scale per token).
    """
    t, c = torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij")
    states = (((37 * t + 11 * c + 5 * t * c) % 23 - 11) * (c + 1) / 8).double()
    fisher = (1 + (13 * t + 7 * c) % 5).double()
    low, high = states.quantile(torch.tensor([0.125, 0.875]).double(), dim=axis, keepdim=True)
    scale, zero = (high - low) / 2, (high + low) / 2
    normalised = (states - zero) / scale
    inlier = normalised.abs() <= 1
    return normalised[inlier], fisher[inlier], (scale**2).expand_as(states)[inlier]


@pytest.mark.parametrize(
    "axis, weighting, centres, cost",
    [
        pytest.param(0, "none", [-0.860080, -0.237217, 0.286331, 0.861841], 0.309959, id="keys"),
        pytest.param(0, "fisher", [-0.827191, -0.190884, 0.255878, 0.855127], 0.810376, id="keys-fisher"),
        pytest.param(0, "scaled", [-0.810850, -0.099849, 0.263445, 0.819093], 2.505885, id="keys-fisher-scaled"),
        pytest.param(1, "fisher", [-0.688206, -0.266443, 0.269555, 0.516770], 0.453449, id="values-fisher"),
        pytest.param(1, "scaled", [-0.683800, -0.230056, 0.350345, 0.614690], 1.698532, id="values-fisher-scaled"),
    ],
)
def test_worked_example_of_a_calibration(axis, weighting, centres, cost):
    points, fisher, squared_scale = calibration_example(axis)
    weights = {"none": torch.ones_like(points), "fisher": fisher, "scaled": fisher * squared_scale}[weighting]
    found = weighted_kmeans(points, weights, 4)
    assert_close(found, torch.tensor(centres), atol=1e-6, rtol=0)
    assert objective(points, weights, found) == pytest.approx(cost, abs=1e-6)


def cheapest_partition(points: Tensor, weights: Tensor, clusters: int) -> float:
    """The cost of the best way to cut the sorted points into `clusters` runs, all ways tried."""
    points, order = points.double().sort()
    weights = weights[order]
    count = len(points)
    costs = {}
    for first, end in combinations(range(count + 1), 2):
        x, w = points[first:end], weights[first:end]
        costs[first, end] = float((w * (x - weighted_mean(x, w)) ** 2).sum())
    cuts = combinations(range(1, count), clusters - 1)
    return min(sum(costs[span] for span in pairwise((0, *cut, count))) for cut in cuts)


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("decades", [0, 3, 12])
@pytest.mark.parametrize("seed", range(5))
def test_no_partition_is_cheaper(seed, decades, clusters):
    # at 12 decades the few heaviest points have clusters of their own, and the weights that decide about the others
    # are lost where sums over all points are subtracted
    points, weights = random_points(seed, 9 + seed, decades)
    best = cheapest_partition(points, weights, clusters)
    assert objective(points, weights, weighted_kmeans(points, weights, clusters)) == pytest.approx(
        best, rel=1e-6, abs=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_histogram_of_2048_bins_costs_what_the_quadratic_recursion_finds(bits):
    # every last cluster of every prefix, one after the other: slow, and plainly right
    edges = torch.linspace(-1, 1, 2049, dtype=torch.float64)
    bins = (edges[1:] + edges[:-1]) / 2
    weights = torch.exp(-6 * bins.abs()) * (1.5 + torch.sin(40 * bins))
    sums = np.pad(torch.stack([weights, weights * bins, weights * bins**2]).cumsum(1).numpy(), ((0, 0), (1, 0)))
    weight, first_moment, second_moment = sums[:, None, :] - sums[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        span = np.where(weight > 0, second_moment - first_moment**2 / weight, np.inf)
    best = span[0]
    for _ in range(2**bits - 1):
        best = (best[:, None] + span).min(axis=0)
    found = objective(bins, weights, weighted_kmeans(bins, weights, 2**bits))
    assert found == pytest.approx(best[-1], rel=1e-9)


@pytest.mark.parametrize("decades", [0, 3, 20])
@pytest.mark.parametrize("seed", range(4))
def test_scikit_learn_finds_nothing_better(seed, decades):
    cluster = pytest.importorskip("sklearn.cluster")
    points, weights = random_points(seed, 500, decades)
    theirs = cluster.KMeans(8, random_state=seed, n_init=3).fit(points[:, None].double(), sample_weight=weights)
    cost = objective(points, weights, torch.from_numpy(theirs.cluster_centers_[:, 0]))
    assert objective(points, weights, weighted_kmeans(points, weights, 8)) <= cost * (1 + 1e-9)


def test_order_of_the_points_does_not_matter():
    points, weights = random_points(0, 63)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    assert_close(weighted_kmeans(points[order], weights[order], 6), weighted_kmeans(points, weights, 6))


@pytest.mark.parametrize("scale", [3.7, -0.5, 1e-30, 1e30])
@pytest.mark.parametrize("shift", [0.0, -2.5])
def test_centres_move_with_the_points(scale, shift):
    points, weights = random_points(0, 63)
    expected = scale * (weighted_kmeans(points, weights, 6) + shift)
    moved = weighted_kmeans(scale * (points + shift), weights, 6)
    assert_close(moved, expected.sort().values, rtol=1e-5, atol=1e-6 * abs(scale))


@pytest.mark.parametrize("factor", [1e-300, 1e-20, 1e300])
def test_only_ratios_of_weights_matter(factor):
    points, weights = random_points(0, 63, decades=8)
    assert_close(weighted_kmeans(points, factor * weights, 6), weighted_kmeans(points, weights, 6))


def test_a_weight_counts_like_that_many_equal_points():
    points, _ = random_points(0, 63)
    counts = torch.arange(63) % 5
    repeated = points.repeat_interleave(counts)
    assert_close(weighted_kmeans(points, counts.double(), 6), weighted_kmeans(repeated, torch.ones(len(repeated)), 6))


def test_one_cluster_is_the_weighted_mean():
    points, weights = random_points(0, 100)
    assert_close(weighted_kmeans(points, weights, 1), weighted_mean(points, weights).float()[None])


@pytest.mark.parametrize("clusters", [3, 4, 7])
def test_too_few_distinct_points_are_the_centres_and_the_largest_is_repeated(clusters):
    points, weights = torch.tensor([0.5, -2.0, 0.5, 1.5, 9.0, -2.0]), torch.tensor([1.0, 2, 3, 1e-20, 0, 1])
    expected = [-2.0, 0.5] + [1.5] * (clusters - 2)
    assert weighted_kmeans(points, weights, clusters).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_float32_centres(dtype):
    points, weights = (tensor.to(dtype) for tensor in random_points(0, 100))
    found = weighted_kmeans(points.requires_grad_(), weights, 4)
    assert_close(found, weighted_kmeans(points.float(), weights.float(), 4))
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize(
    "points, weights, clusters, message",
    [
        ([1.0, float("nan")], [1.0, 1.0], 2, "1 of 2 points are NaN or infinite"),
        ([1.0, 2.0], [1.0, float("inf")], 2, "1 of 2 weights are NaN or infinite"),
        ([1.0, 2.0], [1.0, -0.5], 2, "smallest weight is -0.5"),
        ([1.0, 2.0], [1.0], 2, r"shape \[2\] and weights \[1\]"),
        ([[1.0, 2.0]], [[1.0, 1.0]], 2, r"have to be \[n\]"),
        ([], [], 2, "no points"),
        ([1.0, 2.0], [0.0, 0.0], 2, "all 2 weights are 0"),
        ([1.0, 2.0], [1.0, 1.0], 0, "clusters=0"),
    ],
)
def test_what_cannot_be_clustered_is_explained(points, weights, clusters, message):
    with pytest.raises(ValueError, match=message):
        weighted_kmeans(torch.tensor(points), torch.tensor(weights), clusters)


def test_objective_takes_the_nearest_centre_in_any_order():
    points, weights = torch.tensor([0.0, 0.4, 0.75, 3.0]), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    expected = 10 * 0.4**2 + 100 * 0.25**2 + 1000 * 2**2
    assert objective(points, weights, torch.tensor([1.0, 0.0])) == pytest.approx(expected)


@pytest.mark.parametrize(
    "bits, negative, positive",
    [
        (2, [], [0.337915]),
        (3, [-0.478629, -0.217142], [0.160930, 0.337915, 0.562617]),
        (
            4,
            [-0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050],
            [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957],
        ),
    ],
)
def test_normal_float_levels(bits, negative, positive):
    levels = normal_float(bits)
    assert_close(levels, torch.tensor([-1.0, *negative, 0.0, *positive, 1.0]), atol=1e-6, rtol=0)
    assert {-1.0, 0.0, 1.0} <= set(levels.tolist())


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_normal_float_of_any_width_ascends_from_minus_one_to_one(bits):
    levels = normal_float(bits)
    assert levels.shape == (2**bits,) and (levels.diff() > 0).all()
    assert levels[0] == -1 and levels[-1] == 1


def test_normal_float_needs_a_bit():
    with pytest.raises(ValueError, match="bits=0"):
        normal_float(0)
