"""Codebooks from a histogram, exact, beside scikit-learn's KMeans on the same histogram and on the samples themselves.

The samples are those of KVQuant's keys in the reference model: numbers on their grids, weighted by squared gradient
times squared grid width. `extra_info` holds each codebook's objective on the samples, relative to the exact solver's.
Beside them, moving levels to the grid that kernels read, and what that adds to the exact objective: mean and largest
share over all layers and sides.
"""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cachequant import registry
from cachequant.benchmarks import reference
from cachequant.benchmarks.corpus import stdlib_text
from cachequant.core.calibration.kmeans import objective, weighted_kmeans
from cachequant.core.calibration.statistics import BINS, bin_centres, static_grid
from cachequant.core.hf.taps import TapCache
from cachequant.kernels.quantize import Tables, normalise

WINDOWS, LENGTH, LAYER = 4, 1024, 3


def histogram(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of the bins over -1..1 and the weights that fell into each, both `[bins]`."""
    index = ((points + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
    return bin_centres(), torch.bincount(index, weights.double(), minlength=BINS)


def scikit_learn(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The recipe published with KVQuant."""
    cluster = pytest.importorskip("sklearn.cluster")
    model = cluster.KMeans(clusters, random_state=0, n_init=1, max_iter=50)
    model.fit(points[:, None].numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(model.cluster_centers_[:, 0])


class Calibrated(NamedTuple):
    """The reference model, what it was calibrated on, `[windows, length]`, and KVQuant so calibrated."""

    model: Any
    windows: Tensor
    strategy: Any


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    """With default settings."""
    model, tokenizer = reference.load()
    model.requires_grad_(False)
    ids = torch.tensor(tokenizer(stdlib_text("train").text[:100_000], verbose=False).input_ids)
    windows = ids[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    strategy = registry.get("kvquant")().calibrate(model, None, windows, samples=WINDOWS, heldout=0)
    return Calibrated(model, windows, strategy)


@pytest.fixture(scope="module")
def samples(calibrated: Calibrated) -> tuple[Tensor, Tensor]:
    """Normalised keys of one layer and their weights, both `[samples]` float32."""
    model, windows, strategy = calibrated
    points, weights = [], []

    def observe(layer, side, states, gradient):
        if (layer.index, side) == (LAYER, "key"):
            statistics = strategy.calibration.of(LAYER, "key")
            tables = static_grid(statistics.low, statistics.high, layer.formats.key)
            normalised, width = normalise(states, layer.formats.key, "key", LENGTH, tables=tables)
            inside = normalised.abs() <= 1
            points.append(normalised[inside])
            weights.append((gradient.square() * width.square())[inside])

    for window in windows:
        logits = model(window[None], past_key_values=TapCache(model, strategy, observe, gradients=True)).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], window[1:], reduction="sum").backward()
    weight = torch.cat(weights)
    return torch.cat(points), weight / weight.mean()


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
    benchmark.group = f"codebook of {bits} bits from {len(samples[0]):,} keys"
    data = histogram(*samples) if binned else samples
    centres = benchmark.pedantic(solver, args=(*data, 2**bits), rounds=5, warmup_rounds=1)
    cost = objective(*samples, centres)
    exact = objective(*samples, weighted_kmeans(*histogram(*samples), 2**bits))
    benchmark.extra_info.update(bits=bits, objective=cost, relative_to_exact=cost / exact)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid(benchmark, calibrated, bits):
    benchmark.group = "codebook to its grid"
    centres, adds = bin_centres(), []
    for layer, side in product(range(calibrated.model.config.num_hidden_layers), ("key", "value")):
        mass = calibrated.strategy.calibration.of(layer, side).mass("fisher-scaled")
        fit = weighted_kmeans(centres, mass, 2**bits)
        points = Tables(codebook=fit).codebook
        adds.append(objective(centres, mass, points) / objective(centres, mass, fit) - 1)
    benchmark(lambda: Tables(codebook=fit))
    benchmark.extra_info.update(bits=bits, grid_adds=sum(adds) / len(adds), grid_adds_at_most=max(adds))
