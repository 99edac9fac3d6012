"""Bits per layer and side: what each place loses alone, the best sum under a budget, and what that is really worth.

1. Every place (one side of one layer) is packed alone with each of its choices, the rest of the cache exact, and the
   divergence is measured on the tuning text.
2. Divergences of small errors add up, nearly. The allocation with the smallest sum that keeps the budget is found
   exactly (`knapsack.py`).
3. Errors are not that small at two bits. So the moves next to that allocation are measured in its company, and
   allocated again, as long as the measured divergence falls.
4. What is found is measured on a text that nothing was tuned on, beside settings that treat all layers alike.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict

from ... import registry
from ...core import Side
from ..metrics import pareto_front
from .bench import Bench, Figures
from .budget import Budget
from .knapsack import Option, Unreachable, choose
from .menu import EXACT, SIDES, Choice, Menu, Place

Report = Callable[[str, int, int], None]
Chosen = dict[Place, Choice]
Losses = dict[Place, dict[str, float]]

SPLITS = 4
"""Of the settings that differ between keys and values only, those that look best are measured to be compared with."""

STARTS = 2
"""Settings alike for all layers that are tried as a start beside the allocation of the smallest sum."""

# settings beyond these shares of the budget are not worth the time
NEARBY = (0.6, 1.6)


class Sensitivity(BaseModel):
    """What one place loses when it alone is packed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    side: Side
    strategy: str
    bytes_per_token: float
    kl: float


class Setting(BaseModel):
    """The same for all layers: what a preset has to beat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    split: bool
    """Whether keys and values have strategies or widths of their own; else one strategy serves both."""
    bits: float
    """Packed, by formula."""
    verified: Figures


class Allocation(BaseModel):
    """A preset, and the evidence for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Budget
    budget_bits: float
    bits: float
    """Packed bits per number of the preset, by formula."""
    layers: dict[int, dict[Side, str]]
    """What packs what."""
    predicted: float
    """Sum of the divergences of all places alone."""
    first: float
    """Divergence of that sum's allocation, measured on the tuning text before anything was refined."""
    tuning: Figures
    verified: Figures
    sensitivities: tuple[Sensitivity, ...]
    settings: tuple[Setting, ...]
    """By bits."""

    @property
    def rival(self) -> Setting | None:
        """The best setting that treats all layers alike and keeps the budget, judged where it is verified."""
        return min(self._fitting, key=lambda each: each.verified.kl, default=None)

    @property
    def plain_rival(self) -> Setting | None:
        """The best of those that are one strategy for keys and values."""
        plain = [each for each in self._fitting if not each.split]
        return min(plain, key=lambda each: each.verified.kl, default=None)

    @property
    def _fitting(self) -> list[Setting]:
        return [each for each in self.settings if each.bits <= self.budget_bits * (1 + 1e-9)]


def allocate(
    bench: Bench, menu: Menu, budget: Budget, rounds: int = 2, report: Report | None = None
) -> tuple[Allocation, Any]:
    """The best allocation found under the budget, measured, and the preset.

    Raises ValueError, naming the nearest budget, where even the narrowest choices exceed it.
    """
    tell = report or (lambda what, done, total: None)
    limit = budget.bytes_per_token(menu.elements)
    _require_reachable(menu, budget)
    losses = measure_alone(bench, menu, tell)
    solved = solve(menu, losses, limit)
    # where errors do not add up, it may be worse than what treats all layers alike
    starts = [solved, *(menu.everywhere(*pair) for pair in _alike(menu, losses, limit)[:STARTS])]
    kl, chosen = min(((_kl(bench, start), start) for start in starts), key=lambda each: each[0])
    for number in range(rounds):
        moved = _moved(bench, menu, chosen, kl, losses, limit, partial(tell, f"moves in company, round {number + 1}"))
        if moved == chosen:
            break
        found = _kl(bench, moved)
        if found >= kl:
            break
        chosen, kl = moved, found
    preset = preset_of(chosen)
    settings = list(_settings(bench, menu, losses, limit, tell))
    allocation = Allocation(
        budget=budget,
        budget_bits=budget.bits(menu.elements),
        bits=8 * menu.cost(chosen) / menu.elements,
        layers=_by_layer({place: choice.spec for place, choice in chosen.items()}),
        predicted=_sum(losses, solved),
        first=_kl(bench, solved),
        tuning=bench.measure(preset, "tuning"),
        verified=bench.measure(preset, "verifying"),
        sensitivities=tuple(
            Sensitivity(
                layer=place.layer,
                side=place.side,
                strategy=choice.spec,
                bytes_per_token=choice.bytes_per_token,
                kl=losses[place][choice.spec],
            )
            for place, choices in menu.choices.items()
            for choice in choices
            if choice.spec in losses[place]
        ),
        settings=tuple(sorted(settings, key=lambda each: (each.bits, each.verified.kl))),
    )
    return allocation, preset


def measure_alone(bench: Bench, menu: Menu, report: Report) -> Losses:
    """The divergence of the choices of every place, the rest exact.

    Where a strategy at its narrowest is worse than another that takes no more bytes, its wider choices are left out;
    keys before RoPE do not drive out those after it, which need no angles.
    """
    losses: Losses = {}
    layers = {place.layer for place in menu.served}
    for number, (place, families) in enumerate(menu.families.items()):

        def measured(choice: Choice, place: Place = place) -> float:
            sides = {side: choice.strategy if side == place.side else EXACT for side in SIDES}
            others = sorted(layers - {place.layer})
            alone = _preset(default=EXACT, layers={place.layer: sides}, options={"skip_layers": others})
            return bench.measure(alone, "tuning").kl

        report(f"layer {place.layer}, {place.side}s alone", number, len(menu.served))
        narrowest = {family[0]: measured(family[0]) for family in families}
        after = {choice: loss for choice, loss in narrowest.items() if not choice.before_rope}
        best = _front(narrowest) | _front(after)
        worth = [family for family in families if family[0] in best]
        wider = {choice: measured(choice) for family in worth for choice in family[1:]}
        losses[place] = {choice.spec: loss for choice, loss in {**narrowest, **wider}.items()}
    return losses


def solve(menu: Menu, losses: Mapping[Place, Mapping[str, float]], limit: float) -> Chosen:
    """The smallest sum of losses within `limit` bytes per token; only choices that have a loss are taken.

    Raises Unreachable.
    """
    found: list[tuple[float, Chosen]] = []
    unreachable: list[Unreachable] = []
    # angles are held as soon as any key is kept before RoPE: tried with none, and with as many as it likes
    for before_rope in (False, True):
        room = limit - menu.rope_bytes * before_rope
        open_choices = {
            place: [c for c in choices if c.spec in losses[place] and (before_rope or not c.before_rope)]
            for place, choices in menu.choices.items()
        }
        if not all(open_choices.values()):
            continue
        options = [
            [Option(_units(c.bytes_per_token, menu), losses[place][c.spec]) for c in choices]
            for place, choices in open_choices.items()
        ]
        try:
            picks = choose(options, _units(room, menu))
        except Unreachable as error:
            unreachable.append(error)
            continue
        chosen = {place: open_choices[place][pick] for place, pick in zip(open_choices, picks, strict=True)}
        found.append((_sum(losses, chosen), chosen))
    if not found:
        raise min(unreachable, key=lambda error: error.least)
    return min(found, key=lambda each: each[0])[1]


def preset_of(chosen: Chosen) -> Any:
    """The preset of an allocation: what most layers get is its default."""
    layers = _by_layer({place: choice.strategy for place, choice in chosen.items()})
    kinds = list(layers.values())
    default = max(kinds, key=kinds.count)
    return _preset(default=default, layers={index: sides for index, sides in layers.items() if sides != default})


# ---- inside --------------------------------------------------------------------------------------------------------


def _require_reachable(menu: Menu, budget: Budget) -> None:
    limit = budget.bytes_per_token(menu.elements)
    narrowest = {place: min(choices, key=lambda c: c.bytes_per_token) for place, choices in menu.choices.items()}
    after = {
        place: min((c for c in choices if not c.before_rope), key=lambda c: c.bytes_per_token, default=None)
        for place, choices in menu.choices.items()
    }
    least = menu.cost(narrowest)
    if all(after.values()):
        least = min(least, menu.cost({place: choice for place, choice in after.items() if choice is not None}))
    if least > limit * (1 + 1e-9):
        nearest = 8 * least / menu.elements
        raise ValueError(
            f"a budget of {budget.text} ({budget.bits(menu.elements):.3f} bits per number, {limit:.0f} bytes per "
            f"token) cannot be kept: the narrowest choices take {nearest:.3f} bits, {least:.0f} bytes per token, "
            f"metadata included; give at least {_up(nearest)}"
        )


def _up(bits: float) -> str:
    return f"{-(-bits * 1000 // 1) / 1000:.3f}"


def _units(amount: float, menu: Menu) -> int:
    """Bytes of a block of tokens: whole numbers, where bytes per token are not."""
    return int(amount * menu.block + 1e-6)


def _moved(
    bench: Bench,
    menu: Menu,
    chosen: Chosen,
    kl: float,
    losses: Losses,
    limit: float,
    report: Callable[[int, int], None],
) -> Chosen:
    """The best allocation of the present choices and their neighbours, by what each move changes in this company."""
    moves = [
        (place, neighbour)
        for place, choice in chosen.items()
        for neighbour in _neighbours(menu.choices[place], choice, losses[place])
    ]
    changes: dict[Place, dict[str, float]] = {place: {choice.spec: 0.0} for place, choice in chosen.items()}
    for done, (place, neighbour) in enumerate(moves):
        report(done, len(moves))
        changes[place][neighbour.spec] = _kl(bench, {**chosen, place: neighbour}) - kl
    return solve(menu, changes, limit)


def _neighbours(choices: tuple[Choice, ...], present: Choice, losses: Mapping[str, float]) -> Iterator[Choice]:
    """The next cheaper and the next dearer of the choices that are worth their bytes."""
    worth: list[Choice] = []
    measured = [choice for choice in choices if choice.spec in losses]
    for choice in sorted(measured, key=lambda c: (c.bytes_per_token, losses[c.spec])):
        if not worth or losses[choice.spec] < losses[worth[-1].spec]:
            worth.append(choice)
    cheaper = [c for c in worth if c.bytes_per_token < present.bytes_per_token]
    dearer = [c for c in worth if c.bytes_per_token > present.bytes_per_token]
    yield from cheaper[-1:]
    yield from dearer[:1]


def _settings(bench: Bench, menu: Menu, losses: Losses, limit: float, report: Report) -> Iterator[Setting]:
    """Settings that treat all layers alike: each strategy by itself, and the likeliest splits of keys and values."""
    low, high = (share * limit for share in NEARBY)
    plain = [(rung.spec, rung.spec) for rung in menu.rungs]
    nearby = [pair for pair in plain if low <= menu.cost(menu.everywhere(*pair)) <= high] or plain
    alike = {tuple(menu.everywhere(*pair).values()): pair for pair in plain}
    splits = [pair for pair in _alike(menu, losses, limit) if tuple(menu.everywhere(*pair).values()) not in alike]
    rivals = [*nearby, *splits[:SPLITS]]
    strategies = {rung.spec: rung.strategy for rung in menu.rungs}
    for done, (key, value) in enumerate(rivals):
        report("settings alike for all layers", done, len(rivals))
        both = strategies[key]
        if key != value:
            both = _preset(default={"key": strategies[key], "value": strategies[value]})
        yield Setting(
            split=key != value,
            strategy=key if key == value else registry.spec(_preset(default={"key": key, "value": value})),
            bits=8 * menu.cost(menu.everywhere(key, value)) / menu.elements,
            verified=bench.measure(both, "verifying"),
        )


def _front(losses: Mapping[Choice, float]) -> set[Choice]:
    """The choices that no other beats in both bytes and loss."""
    front = pareto_front([(choice.bytes_per_token, loss) for choice, loss in losses.items()])
    return {choice for choice, best in zip(losses, front, strict=True) if best}


def _alike(menu: Menu, losses: Losses, limit: float) -> list[tuple[str, str]]:
    """One strategy for all keys and one for all values, within the budget, by how good they look."""
    found: dict[tuple[Choice, ...], tuple[str, str]] = {}
    specs = [rung.spec for rung in menu.rungs]
    for key, value in product(specs, specs):
        chosen = menu.everywhere(key, value)
        if menu.cost(chosen) <= limit * (1 + 1e-9):
            found.setdefault(tuple(chosen.values()), (key, value))
    return sorted(found.values(), key=lambda pair: _sum(losses, menu.everywhere(*pair)))


def _sum(losses: Mapping[Place, Mapping[str, float]], chosen: Chosen) -> float:
    """What was not measured counts as the worst that was."""
    return sum(losses[place].get(choice.spec, max(losses[place].values())) for place, choice in chosen.items())


def _by_layer(places: Mapping[Place, Any]) -> dict[int, dict[Side, Any]]:
    layers: dict[int, dict[Side, Any]] = {}
    for place, what in places.items():
        layers.setdefault(place.layer, {})[place.side] = what
    return layers


def _kl(bench: Bench, chosen: Chosen) -> float:
    return bench.measure(preset_of(chosen), "tuning").kl


def _preset(**settings: Any) -> Any:
    return registry.get("preset")(**settings)
