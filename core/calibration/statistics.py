"""What a calibration learns of one side of one layer, gathered window by window in bounded memory.

Three things: the range of every channel (for static grids), how numbers spread over their grids (for codebooks and
Q-Norm), and how large queries are (for strategies that bound the errors of scores). The spread is a histogram, not
samples: it is as long for a million tokens as for a thousand, and codebooks of any width and weighting come from it.
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
        number's grid, which turns normalised errors into those of activations (KVQuant, appendix E); None where
        tokens have widths of their own.
    low, high: `[kv_heads, head_dim]` float32 of float16 values, the range of each channel; None for online grids.
    sensitivity: `[kv_heads, head_dim]` float32, the root of each channel's mean Fisher information, largest 1; None
        where none was measured.
    query_norm: `[kv_heads]` float32, keys only: the quantile that the recipe names of the squared norms of the queries
        that read them, scaled as scores are (by `1 / sqrt(head_dim)` in most models); None where none was measured.
    """

    density: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    sensitivity: Tensor | None = None
    query_norm: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def grid(self, fmt: Format) -> Tables:
        """The static scale and zero that span the channels' ranges; none for a format with online grids."""
        if fmt.scale != "static":
            return Tables()
        if self.low is None or self.high is None:
            raise ValueError("the calibration measured no channel ranges, which scale='static' needs; calibrate again")
        return static_grid(self.low, self.high, fmt)

    def mass(self, weights: Weights) -> Tensor:
        """`[BINS]`, one row of the density."""
        if self.density is None:
            raise ValueError("the calibration measured no density, which tables are fitted to: a MixedFormat has none")
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


class Largest:
    """An exact quantile of each of several rows whose numbers come in parts, from the largest of them alone.

    numbers: how many will be added to each row. share: what lies above the quantile.
    """

    def __init__(self, numbers: int, share: float, kept: Tensor | None = None) -> None:
        self.numbers = numbers
        # linear interpolation between the two numbers around the quantile, as numpy does it
        self._place = (numbers - 1) * share
        self.kept = kept
        """Those of every row so far, `[..., count]`, descending."""

    def add(self, rows: Tensor) -> None:
        """Take `rows [..., n]` into account."""
        rows = rows if self.kept is None else torch.cat([self.kept.to(rows.device), rows], -1)
        self.kept = rows.topk(min(math.floor(self._place) + 2, self.numbers, rows.shape[-1]), -1).values

    def quantile(self) -> Tensor:
        """`[...]`, of every row."""
        if self.kept is None:
            raise ValueError("no tokens were added")
        first = math.floor(self._place)
        outer, inner = self.kept[..., first], self.kept[..., min(first + 1, self.kept.shape[-1] - 1)]
        return torch.lerp(outer, inner, self._place - first)


class Extremes:
    """Exact percentiles of every channel over a known number of tokens, from its largest and smallest numbers alone.

    tokens: how many will be added. share: what lies outside the range, half of it at either end.
    """

    def __init__(self, tokens: int, share: float, kept: tuple[Tensor, Tensor] | None = None) -> None:
        largest, smallest = (None, None) if kept is None else kept
        self._high = Largest(tokens, share / 2, largest)
        self._low = Largest(tokens, share / 2, None if smallest is None else -smallest)

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """Largest and smallest numbers so far, `[kv_heads, head_dim, count]` each."""
        high, low = self._high.kept, self._low.kept
        return None if high is None or low is None else (high, -low)

    def add(self, states: Tensor) -> None:
        """Take `states [batch, kv_heads, tokens, head_dim]` into account."""
        rows = states.float().permute(1, 3, 0, 2).flatten(2)
        self._high.add(rows)
        self._low.add(-rows)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """low and high `[kv_heads, head_dim]` float32, rounded to float16."""
        low, high = -self._low.quantile(), self._high.quantile()
        return _to_float16(low), _to_float16(high)


def _to_float16(numbers: Tensor) -> Tensor:
    return numbers.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


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
