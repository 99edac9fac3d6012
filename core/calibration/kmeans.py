"""Levels for codebooks: exact one-dimensional k-means (KVQuant, arXiv 2401.18079, eq. 1), NormalFloat, Lloyd-Max.

A point belongs to its nearest centre, one on the midpoint of two centres to the lower, as in `kernels.quantize`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def weighted_kmeans(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The centres that minimise `objective`: its global optimum, where Lloyd's iteration finds a local one.

    points: `[n]`, any float dtype, any order.
    weights: `[n]`, finite and not negative, of any range; points of weight 0 count for nothing.

    Returns `[clusters]` float32 on the device of `points`, ascending. Fewer distinct points than clusters: the
    points, the largest repeated. Takes O(clusters n log n) time and O((clusters + log n) n) memory. Rounding may cost
    some 1e-14 of what the best two clusters cost, which shows only where weights differ by more than that.
    """
    _check(points, weights, clusters)
    x, w, scale = _distinct(_float64(points), _float64(weights))
    firsts = np.arange(len(x)) if len(x) <= clusters else _first_points(x, w, clusters)
    # relative to its first point, so that a mean does not leave its cluster by rounding
    origins = x[firsts]
    offsets = x - np.repeat(origins, np.diff(firsts, append=len(x)))
    centres = origins + np.add.reduceat(w * offsets, firsts) / np.add.reduceat(w, firsts)
    centres = np.pad(scale * centres, (0, clusters - len(centres)), mode="edge")
    return torch.from_numpy(centres).float().to(points.device)


def objective(points: Tensor, weights: Tensor, centres: Tensor) -> float:
    """Sum of weights times squared distances to the nearest centre, in float64.

    points, weights: `[n]`. centres: `[clusters]`, any order.
    """
    x, w, levels = (tensor.detach().cpu().double() for tensor in (points, weights, centres))
    levels = levels.sort().values
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    return float((w * (x - nearest) ** 2).sum())


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels (QLoRA, arXiv 2305.14314): quantiles of the normal distribution, 0 and both ends exact.

    Returns `[2**bits]` float32, ascending from -1 to 1.
    """
    if bits < 1:
        raise ValueError(f"bits={bits} leave no levels; use 1 or more")
    half = 2 ** (bits - 1)
    outermost = (1 / 32 + 1 / 30) / 2
    negative = torch.special.ndtri(torch.linspace(outermost, 0.5, half, dtype=torch.float64))
    positive = torch.special.ndtri(torch.linspace(0.5, 1 - outermost, half + 1, dtype=torch.float64))
    # both halves begin at 0
    return torch.cat([-negative / negative[0], positive[1:] / positive[-1]]).float()


def lloyd_max(bits: int) -> Tensor:
    """The levels with the smallest squared error on the normal distribution (J. Max, 1960), in its deviations.

    Returns `[2**bits]` float32, ascending, symmetric around 0. Found on a fine grid, they are right to 1e-3.
    """
    if bits < 1:
        raise ValueError(f"bits={bits} leave no levels; use 1 or more")
    # as many points on either side of 0, and none there
    points = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14 * 12 - 6
    levels = weighted_kmeans(points, (points.square() / -2).exp(), 2**bits)
    return (levels - levels.flip(0)) / 2


def _check(points: Tensor, weights: Tensor, clusters: int) -> None:
    if clusters < 1:
        raise ValueError(f"clusters={clusters}; a codebook needs at least 1")
    if points.ndim != 1 or points.shape != weights.shape:
        shapes = f"points have shape {list(points.shape)} and weights {list(weights.shape)}"
        raise ValueError(f"{shapes}; both have to be [n], one weight per point")
    if not len(points):
        raise ValueError("there are no points to cluster; was every value left out as an outlier or a sink?")
    for name, tensor in (("points", points), ("weights", weights)):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(f"{bad} of {len(tensor)} {name} are NaN or infinite; leave them out")
    if (weights < 0).any():
        raise ValueError(f"the smallest weight is {float(weights.min())}; weights are squares and cannot be negative")
    if not weights.any():
        raise ValueError(f"all {len(weights)} weights are 0; pass ones for a clustering without weights")


def _float64(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().double().numpy()


def _distinct(points: Floats, weights: Floats) -> tuple[Floats, Floats, float]:
    """Ascending distinct points within [-1, 1], their positive weights up to a factor, and what points were divided by.

    Squares and products of either then neither overflow nor vanish.
    """
    weights = weights / weights.max()
    points, weights = points[weights > 0], weights[weights > 0]
    scale = float(np.abs(points).max()) or 1.0
    distinct, inverse = np.unique(points / scale, return_inverse=True)
    return distinct, np.bincount(inverse, weights).astype(np.float64), scale


def _first_points(points: Floats, weights: Floats, clusters: int) -> Indices:
    """Indices at which the best clusters begin, ascending, the first of them 0.

    Dynamic programming over the number of clusters: the best clustering of the points up to `last` is a last cluster
    `first..last` behind the best clustering of the points before it.
    """
    if clusters == 1:
        return np.zeros(1, dtype=np.int64)
    count = len(points)
    spans = _Spans(points, weights)
    costs = spans.cost(np.zeros(count, dtype=np.int64), np.arange(count))
    choices: list[Indices] = []
    for _ in range(clusters - 2):
        costs, first = _add_cluster(costs, spans)
        choices.append(first)
    # of the clusters that come last only those that end at the last point are wanted
    total = costs[:-1] + spans.cost(np.arange(1, count), np.full(count - 1, count - 1))
    found = [1 + int(total.argmin())]
    for first in reversed(choices):
        # 0: fewer clusters do as well, to within rounding
        found.append(int(first[found[-1] - 1]) if found[-1] else 0)
    return np.unique([0, *found])


def _add_cluster(costs: Floats, spans: "_Spans") -> tuple[Floats, Indices]:
    """The cheapest clusterings with one more cluster, given those that cost `costs[last]`, and where theirs begins.

    The first point of the last cluster never moves left as the last point moves right. So ends are filled in at
    ever smaller strides, and each looks only between what its two neighbours chose: O(n) candidates per stride.
    """
    count = len(costs)
    before = np.concatenate([[0.0], costs[:-1]])
    # by the number of points clustered, 1..count, between two guards
    best, first = np.zeros(count + 2), np.zeros(count + 2, dtype=np.int64)
    first[-1] = count
    stride = 1 << (count.bit_length() - 1)
    while stride:
        ends = np.arange(stride, count + 1, 2 * stride)
        low = first[ends - stride]
        high = np.minimum(first[np.minimum(ends + stride, count + 1)], ends - 1)
        sizes = high - low + 1
        offsets = np.cumsum(sizes) - sizes
        end = np.repeat(ends, sizes)
        start = np.arange(len(end)) + np.repeat(low - offsets, sizes)
        total = before[start] + spans.cost(start, end - 1)
        best[ends] = np.minimum.reduceat(total, offsets)
        # backwards, since the last of several assignments to an end stays: ties go to the leftmost start
        cheapest = np.flatnonzero(total == best[end])[::-1]
        first[end[cheapest]] = start[cheapest]
        stride >>= 1
    return best[1:-1], first[1:-1]


class _Spans:
    """What it costs to put neighbouring points into one cluster, accurate however far their weights lie apart.

    Differences of prefix sums would drown small weights behind large ones. Here nothing is subtracted: for every
    power of two, points are cut into blocks of that size, and from the middle of a block outwards, both ways, the
    weight, the mean distance from the middle and the cost of what was passed are kept. Two neighbouring runs then make
    up any span: they meet in the middle of the smallest block that holds both of its ends.
    """

    def __init__(self, points: Floats, weights: Floats) -> None:
        count = len(points)
        levels = (count - 1).bit_length()
        self.size = 1 << levels
        # padding of the last point's kind: inside no span, but in reach of the scans
        x, w = (np.pad(values, (0, self.size - count), mode="edge") for values in (points, weights))
        self.weight, self.mean, self.cost_to = (np.zeros((levels + 1, self.size)) for _ in range(3))
        # level 0, spans of one point: mean distance and cost are 0
        self.weight[0] = w
        self.level = np.zeros(self.size, dtype=np.int64)
        for level in range(1, levels + 1):
            half = 1 << (level - 1)
            self.level[half : 2 * half] = level
            blocks = x.reshape(-1, 2, half)
            distances = np.abs(blocks - blocks[:, 1:, :1])
            for side, outwards in ((0, slice(None, None, -1)), (1, slice(None))):
                scanned = _scan(distances[:, side, outwards], w.reshape(-1, 2, half)[:, side, outwards])
                for table, values in zip((self.weight, self.mean, self.cost_to), scanned, strict=True):
                    table[level].reshape(-1, 2, half)[:, side, outwards] = values
        self.weight, self.mean, self.cost_to = (table.ravel() for table in (self.weight, self.mean, self.cost_to))

    def cost(self, first: Indices, last: Indices) -> Floats:
        """Weighted squares around the mean of the points `first..last`, elementwise."""
        row = self.level[first ^ last] * self.size
        left, right = row + first, row + last
        left_weight, right_weight = self.weight[left], self.weight[right]
        apart = self.mean[left] + self.mean[right]
        between = left_weight * (right_weight / (left_weight + right_weight)) * apart**2
        return self.cost_to[left] + self.cost_to[right] + between


def _scan(distances: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weight, mean and cost of the first 1, 2, ... points of every row."""
    weight = np.cumsum(weights, axis=1)
    mean = np.cumsum(weights * distances, axis=1) / weight
    gain = weights[:, 1:] * (weight[:, :-1] / weight[:, 1:]) * (distances[:, 1:] - mean[:, :-1]) ** 2
    return weight, mean, np.pad(np.cumsum(gain, axis=1), ((0, 0), (1, 0)))
