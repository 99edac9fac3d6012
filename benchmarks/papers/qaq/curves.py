"""Curves of size against divergence, and what they say of each other at equal divergence."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

# Below this a divergence is float rounding, and has no place on a logarithmic scale.
EXACT = 1e-6

# Smaller differences of a divergence are noise (docs/measuring.md).
NOISE = 1.1

Verdict = Literal["holds", "does not hold", "undecided", "no overlap"]


class Point(NamedTuple):
    """One setting."""

    kl: float
    bits: float


Curve = tuple[Point, ...]
"""By falling bits and growing divergence."""


class Reading(NamedTuple):
    """Bits that a curve takes to reach a divergence."""

    bits: float
    enough: bool
    """The curve ends before: these bits are enough, and perhaps fewer were."""


class Comparison(BaseModel):
    """Two curves at equal divergence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    overlap: tuple[float, float] | None = None
    """Least and largest divergence that both reach."""
    ratio: float | None = None
    """Bits of the second over bits of the first, each averaged over the logarithm of the divergence."""
    least: float | None = None
    most: float | None = None
    """Of the ratio, anywhere in the overlap."""


def curve(points: Iterable[Point]) -> Curve:
    """The points that no other beats in both; between neighbours bits are linear in the logarithm of divergence."""
    kept: list[Point] = []
    for point in sorted(point for point in points if point.kl >= EXACT):
        if not kept or point.bits < kept[-1].bits:
            kept.append(point)
    return tuple(kept)


def bits_at(curve: Curve, kl: float) -> float | None:
    """Bits at a divergence, None outside the curve."""
    for a, b in pairwise(curve):
        if a.kl <= kl <= b.kl:
            part = math.log(kl / a.kl) / math.log(b.kl / a.kl)
            return a.bits + part * (b.bits - a.bits)
    return next((point.bits for point in curve if point.kl == kl), None)


def reading(curve: Curve, kl: float) -> Reading | None:
    """Bits to reach a divergence; None where no point does."""
    if not curve or kl < curve[0].kl:
        return None
    bits = bits_at(curve, kl)
    return Reading(curve[-1].bits, True) if bits is None else Reading(bits, False)


def overlap(a: Curve, b: Curve) -> tuple[float, float] | None:
    """Divergences that both curves span; None where it is no more than a point."""
    if not a or not b:
        return None
    low, high = max(a[0].kl, b[0].kl), min(a[-1].kl, b[-1].kl)
    return (low, high) if low < high else None


def compare(better: Curve, worse: Curve) -> Comparison:
    """Whether `better` takes fewer bits than `worse`, even if its divergence were a tenth more than measured."""
    ratios = _ratios(better, worse)
    span = overlap(better, worse)
    if ratios is None or span is None:
        return Comparison(verdict="no overlap")
    mean, every = ratios
    pessimist, optimist = _ratios(_noisy(better), worse), _ratios(better, _noisy(worse))
    verdict: Verdict = "undecided"
    if pessimist and pessimist[0] > 1:
        verdict = "holds"
    elif optimist and optimist[0] < 1:
        verdict = "does not hold"
    return Comparison(verdict=verdict, overlap=span, ratio=mean, least=min(every), most=max(every))


def _noisy(curve: Curve) -> Curve:
    return tuple(Point(point.kl * NOISE, point.bits) for point in curve)


def _ratios(first: Curve, second: Curve) -> tuple[float, list[float]] | None:
    """Mean bits of the second over those of the first, and the ratio wherever either curve bends."""
    span = overlap(first, second)
    if span is None:
        return None
    knots = sorted({*span, *(point.kl for point in (*first, *second) if span[0] < point.kl < span[1])})
    a, b = (_bits(each, knots) for each in (first, second))
    # exact: both are straight lines between knots
    area = [
        sum((y + z) * math.log(v / u) for (u, v), (y, z) in zip(pairwise(knots), pairwise(bits), strict=True))
        for bits in (a, b)
    ]
    return area[1] / area[0], [y / x for x, y in zip(a, b, strict=True)]


def _bits(curve: Curve, knots: Sequence[float]) -> list[float]:
    found = [bits_at(curve, kl) for kl in knots]
    return [bits for bits in found if bits is not None]


# ---- compression at equal accuracy ---------------------------------------------------------------------------------


class Compressed(BaseModel):
    """How many times smaller than 16 bits a method is at a divergence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float | None = None
    """None: no setting reaches the divergence."""
    at_least: bool = False
    """It may be more: all settings are more accurate than asked."""


def compressed(curve: Curve, kl: float) -> Compressed:
    """At a divergence."""
    found = reading(curve, kl)
    return Compressed() if found is None else Compressed(ratio=16 / found.bits, at_least=found.enough)


class Advantage(BaseModel):
    """How many times more one method compresses than the best of others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    best: str | None = None
    """Of the others; None where none reaches the divergence."""
    ratio: float | None = None
    bound: Literal["", "at least", "at most"] = ""


def advantage(ours: Compressed, others: dict[str, Compressed]) -> Advantage:
    """Of `ours` over the best of `others`, if both reach the divergence and one of them is known exactly."""
    reached = {name: each.ratio for name, each in others.items() if each.ratio is not None}
    if not reached:
        return Advantage()
    best = max(reached, key=lambda name: reached[name])
    open_ended = any(each.at_least for each in others.values())
    if ours.ratio is None or (ours.at_least and open_ended):
        return Advantage(best=best)
    bound = "at least" if ours.at_least else "at most" if open_ended else ""
    return Advantage(best=best, ratio=ours.ratio / reached[best], bound=bound)
