"""Which option to take in every place so that the sum of losses is smallest under a budget: exact."""

from collections.abc import Sequence
from functools import reduce
from math import ceil, floor, gcd
from typing import NamedTuple

import numpy as np

# beyond this many steps of cost, costs are rounded up to whole steps; the budget is still kept
STEPS = 100_000


class Option(NamedTuple):
    """One way to fill a place."""

    cost: int
    loss: float


class Unreachable(ValueError):
    """Even the cheapest options cost more than the budget; `least` is what they cost."""

    def __init__(self, least: int, budget: int) -> None:
        super().__init__(f"the cheapest options cost {least}, more than the budget of {budget}")
        self.least = least


def choose(places: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option taken in each place; of equal losses the cheaper one.

    Dynamic programming over all sums of costs, so the answer is the best one, whatever the losses look like; they may
    be negative. Raises Unreachable.
    """
    least = sum(min(option.cost for option in options) for options in places)
    if least > budget:
        raise Unreachable(least, budget)
    step, steps = _steps(places, budget)
    best = np.zeros(steps + 1)
    taken = np.zeros((len(places), steps + 1), dtype=np.int32)
    for place, options in enumerate(places):
        cheapest_first = sorted(range(len(options)), key=lambda index, options=options: options[index].cost)
        after = np.full(steps + 1, np.inf)
        for index in cheapest_first:
            cost = ceil(options[index].cost / step)
            if cost > steps:
                continue
            reached = best[: steps + 1 - cost] + options[index].loss
            better = reached < after[cost:]
            after[cost:][better] = reached[better]
            taken[place, cost:][better] = index
        best = after
    if not np.isfinite(best[steps]):  # rounding costs up left no room
        return [min(range(len(options)), key=lambda index, o=options: o[index].cost) for options in places]
    left = int(np.argmin(best))
    chosen = []
    for place in range(len(places) - 1, -1, -1):
        index = int(taken[place, left])
        chosen.append(index)
        left -= ceil(places[place][index].cost / step)
    return chosen[::-1]


def _steps(places: Sequence[Sequence[Option]], budget: int) -> tuple[int, int]:
    """The size of a step of cost, and how many of them are worth looking at."""
    most = sum(max(option.cost for option in options) for options in places)
    limit = min(budget, most)
    size = reduce(gcd, (option.cost for options in places for option in options)) or 1
    size = max(size, ceil(limit / STEPS))
    return size, floor(limit / size)
