"""What a calibration learns of one side of one layer, gathered window by window in bounded memory.

Two things: the range of every channel (for static grids), and how numbers spread over their grids (for codebooks and
Q-Norm). The spread is a histogram, not samples: it is as long for a million tokens as for a thousand, and codebooks of
any width and weighting come from it.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...kernels.format import Format
from ...kernels.quantize import FLOAT16_MAX, Tables

Weights = Literal["equal", "fisher", "fisher-scaled"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

BINS = 2048
"""Bins over [-1, 1]: 1/130 of a step of a 4-bit codebook each."""

# a range is stored as float16, so numbers at its ends come out slightly beyond 1
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Statistics:
    """Of one side of one layer.

    density: `[3, BINS]` float32, the mass in each bin of normalised numbers, one row per entry of `WEIGHTS`: their
        count, their Fisher information F (squared gradient of the loss), and F * s**2, s being half the width of a
        number's grid, which turns normalised errors into those of activations (KVQuant, appendix E).
    low, high: `[kv_heads, head_dim]` float32 of float16 values, the range of each channel; None for online grids.
    sensitivity: `[kv_heads, head_dim]` float32, the root of each channel's mean Fisher information, largest 1; None
        where none was measured.
    """

    density: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    sensitivity: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        named = {"density": self.density, "low": self.low, "high": self.high, "sensitivity": self.sensitivity}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def grid(self, fmt: Format) -> Tables:
        """The static scale and zero that span the channels' ranges; none for a format with online grids."""
        if fmt.scale != "static":
            return Tables()
        if self.low is None or self.high is None:
            raise ValueError("the calibration measured no channel ranges, which scale='static' needs; calibrate again")
        return static_grid(self.low, self.high, fmt)

    def mass(self, weights: Weights) -> Tensor:
        """`[BINS]`, one row of the density."""
        return self.density[WEIGHTS.index(weights)]


def static_grid(low: Tensor, high: Tensor, fmt: Format) -> Tables:
    """Scale and zero `[kv_heads, head_dim]` of a static format whose grids span `low` to `high`."""
    if fmt.codes == "codebook":
        return Tables(scale=(high - low) / 2, zero=(high + low) / 2)
    return Tables(scale=(high - low) / (2**fmt.bits - 1), zero=low.clone())


def bin_centres() -> Tensor:
    """`[BINS]` float64, the normalised numbers that the bins stand for."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1


class Density:
    """The histogram of one side, while it grows."""

    def __init__(self, mass: Tensor | None = None) -> None:
        self.mass = torch.zeros(len(WEIGHTS), BINS, dtype=torch.float64) if mass is None else mass

    def add(self, normalised: Tensor, width: Tensor, keep: Tensor, fisher: Tensor | None = None) -> None:
        """Count numbers.

        normalised, width: as `kernels.quantize.normalise` returns them. keep: bool, broadcastable; numbers outside it,
        outside the range or without a range are left out. fisher: squared gradients of the same shape; None counts
        every number alike.
        """
        inside = keep & (normalised.abs() <= 1 + _ROUNDING) & (width > 0)
        index = ((normalised[inside] + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        squares = width[inside].double().square()
        weight = torch.ones_like(squares) if fisher is None else fisher[inside].double()
        rows = [torch.bincount(index, row, BINS) for row in (torch.ones_like(weight), weight, weight * squares)]
        self.mass += torch.stack(rows).to(self.mass.device)


class Extremes:
    """Exact percentiles of every channel over a known number of tokens, from its largest and smallest numbers alone.

    tokens: how many will be added. share: what lies outside the range, half of it at either end.
    """

    def __init__(self, tokens: int, share: float, kept: tuple[Tensor, Tensor] | None = None) -> None:
        self.tokens = tokens
        # linear interpolation between the two numbers around the percentile, as numpy does it
        self._place = (tokens - 1) * share / 2
        self._count = min(tokens, math.floor(self._place) + 2)
        self.kept = kept
        """Largest and smallest numbers so far, `[kv_heads, head_dim, count]` each."""

    def add(self, states: Tensor) -> None:
        """Take `states [batch, kv_heads, tokens, head_dim]` into account."""
        rows = states.float().permute(1, 3, 0, 2).flatten(2)
        largest, smallest = (
            (rows, rows) if self.kept is None else (torch.cat([k.to(rows.device), rows], -1) for k in self.kept)
        )
        count = min(self._count, largest.shape[-1])
        self.kept = largest.topk(count, -1).values, smallest.topk(count, -1, largest=False).values

    def bounds(self) -> tuple[Tensor, Tensor]:
        """low and high `[kv_heads, head_dim]` float32, rounded to float16."""
        if self.kept is None:
            raise ValueError("no tokens were added")
        first = math.floor(self._place)
        fraction = self._place - first
        bounds = []
        for ordered in self.kept:
            outer, inner = ordered[..., first], ordered[..., min(first + 1, ordered.shape[-1] - 1)]
            bounds.append(torch.lerp(outer, inner, fraction).clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float())
        high, low = bounds
        return low, high


def q_norm(points: Tensor, mass: Tensor, levels: Tensor) -> tuple[float, float]:
    """KVQuant's Q-Norm: gain and offset with which decoded numbers have the mean and deviation of the original.

    points, mass: `[n]` normalised numbers and how often each occurs, unweighted by sensitivity. levels: ascending
    `[2**bits]`. Decoding reads `gain * level + offset` where encoding rounded to `level`.
    """
    points, mass, levels = points.double(), mass.double(), levels.double()
    rounded = levels[torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)]
    mean, deviation = _moments(points, mass)
    rounded_mean, rounded_deviation = _moments(rounded, mass)
    gain = deviation / rounded_deviation if rounded_deviation > 0 else 1.0
    return gain, mean - rounded_mean * gain


def _moments(points: Tensor, mass: Tensor) -> tuple[float, float]:
    total = mass.sum()
    mean = (points * mass).sum() / total
    return float(mean), float(((points - mean).square() * mass).sum().div(total).sqrt())
