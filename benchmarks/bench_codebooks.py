"""Codebooks from a histogram, exact, beside scikit-learn's KMeans on the same histogram and on the samples themselves.

`extra_info` holds each codebook's objective on the samples, and how many times the exact solver's that is.
"""

import pytest
import torch
from torch import Tensor

from cachequant.core.calibration.kmeans import objective, weighted_kmeans

SAMPLES = 200_000
BINS = 2048


def heavy_tailed() -> tuple[Tensor, Tensor]:
    """Normalised states and the squares of their gradients, both `[samples]` float32: Student's t, 3 degrees."""
    normal = torch.randn(2, 4, SAMPLES, generator=torch.Generator().manual_seed(0))
    states, gradients = normal[:, 0] / normal[:, 1:].square().mean(dim=1).sqrt()
    # as with one percent of outliers: the rest spans -1..1
    states = states / states.abs().quantile(0.99)
    inlier = states.abs() <= 1
    return states[inlier], gradients[inlier] ** 2


def histogram(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of equal bins over -1..1 and the weights that fell into each, both `[bins]`."""
    index = ((points + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
    return (torch.arange(BINS) + 0.5) * (2 / BINS) - 1, torch.bincount(index, weights.double(), minlength=BINS)


def scikit_learn(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The recipe published with KVQuant."""
    cluster = pytest.importorskip("sklearn.cluster")
    model = cluster.KMeans(clusters, random_state=0, n_init=1, max_iter=50)
    model.fit(points[:, None].numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(model.cluster_centers_[:, 0])


@pytest.fixture(scope="module")
def samples():
    return heavy_tailed()


@pytest.mark.parametrize(
    "solver, binned",
    [
        pytest.param(weighted_kmeans, True, id="exact-histogram"),
        pytest.param(scikit_learn, True, id="scikit-learn-histogram"),
        pytest.param(scikit_learn, False, id="scikit-learn-samples"),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook(benchmark, samples, solver, binned, bits):
    benchmark.group = f"codebook of {bits} bits from {SAMPLES:,} samples"
    data = histogram(*samples) if binned else samples
    centres = benchmark.pedantic(solver, args=(*data, 2**bits), rounds=5, warmup_rounds=1)
    cost = objective(*samples, centres)
    exact = objective(*samples, weighted_kmeans(*histogram(*samples), 2**bits))
    benchmark.extra_info.update(bits=bits, objective=cost, relative_to_exact=cost / exact)
