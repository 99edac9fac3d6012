"""Intervals of the difference between two figures that are means over samples."""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES, PARTS = 10_000, 10
SEED = 0

# Fewer samples that all agree do so by chance more than once in twenty times: they are not drawn from.
FEWEST_SAMPLES = 6
# From here on Student's t is the normal distribution.
MANY = 200


def paired(a: np.ndarray, b: np.ndarray, function: Callable[[Any], Any]) -> tuple[float, float]:
    """Ends of the interval of function(mean(b)) - function(mean(a)), by a bootstrap that draws from both alike.

    a, b: `[samples]`, the same questions in the same order. function: of numbers, elementwise.
    """
    random = np.random.default_rng(SEED)
    found = []
    for _ in range(PARTS):  # samples may be thousands
        drawn = random.integers(len(a), size=(RESAMPLES // PARTS, len(a)))
        found.append(function(b[drawn].mean(1)) - function(a[drawn].mean(1)))
    tail = _tail(len(a))
    low, high = np.quantile(np.concatenate(found), (tail, 1 - tail))
    return float(low), float(high)


def jackknifed(a: np.ndarray, b: np.ndarray, function: Callable[[Any], Any]) -> tuple[float, float]:
    """The same for samples too few to draw from: Student's interval of the differences, by leaving out each once.

    Raises ValueError for less than two samples.
    """
    count = len(a)
    if count < 2:
        raise ValueError("one sample says nothing of how much others differ")

    def difference(kept: Any) -> float:
        return float(function(b[kept].mean()) - function(a[kept].mean()))

    whole = difference(np.arange(count))
    pseudo = [count * whole - (count - 1) * difference(np.arange(count) != i) for i in range(count)]
    width = _student((1 + CONFIDENCE) / 2, count - 1) * float(np.std(pseudo, ddof=1)) / math.sqrt(count)
    return whole - width, whole + width


def unpaired(difference: float, error_a: float, error_b: float, samples: int) -> tuple[float, float]:
    """Ends of the interval of a difference of two figures with independent standard errors.

    samples: of the figure that has fewer; few make errors unsure themselves.
    """
    freedom = max(1, samples - 1)
    quantile = _student((1 + CONFIDENCE) / 2, freedom) if freedom < MANY else NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    width = quantile * math.hypot(error_a, error_b)
    return difference - width, difference + width


@cache
def _tail(samples: int) -> float:
    """The quantile where the interval ends: plain percentiles are too narrow for few samples.

    Widened as Student's t is wider than the normal distribution (Hesterberg, https://arxiv.org/abs/1411.5279).
    """
    width = math.sqrt(samples / (samples - 1)) * _student((1 + CONFIDENCE) / 2, samples - 1)
    return NormalDist().cdf(-width)


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by summing up its density; to three digits from five degrees of freedom on."""
    x = np.linspace(0, 50, 500_001)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    summed = 0.5 + np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    return float(x[1 + np.searchsorted(summed, probability)])
