"""Two runs, or two strategies, side by side: what differs, by how much, and whether chance explains it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..sweep.cells import Result
from ..sweep.store import Store
from ..tasks.base import Metric
from .intervals import FEWEST_SAMPLES, jackknifed, paired, unpaired
from .run import NAME, Run, metrics_of

# Smaller differences, relative to the figures or to 1, are rounding.
ROUNDING = 1e-6

# Metrics that are a function of the mean of another column of the samples.
OF_MEANS: dict[str, tuple[str, Callable[[Any], Any]]] = {"perplexity": ("loss", np.exp)}

# Of the memory of both, the figures whose ratio is told.
WEIGHED = ("bits_per_element", "packed_bits_per_element", "device_bytes", "host_bytes")

Verdict = Literal["better", "worse", "no difference shown", "not tested"]


class Incomparable(ValueError):
    """Two runs without anything in common."""


class Difference(BaseModel):
    """One figure in both; what is told is B's part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    a: float
    b: float
    difference: float
    """B less A."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval of the difference; None where there is no telling."""
    how: str
    """Where the interval is from, or why there is none."""
    verdict: Verdict


class Ratio(BaseModel):
    """Bytes, bits or milliseconds in both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    a: float
    b: float
    ratio: float | None
    """B by A; None where A is 0."""


class Pair(BaseModel):
    """A cell of A and the one of B that asks the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    panel: str
    strategy_a: str
    strategy_b: str
    differences: tuple[Difference, ...] = ()
    memory: tuple[Ratio, ...] = ()
    latency: tuple[Ratio, ...] = ()
    failed: tuple[str, ...] = ()
    """Why there is nothing to compare."""

    @property
    def name(self) -> str:
        """The strategy, or both."""
        if self.strategy_a == self.strategy_b:
            return self.strategy_a
        return f"{self.strategy_a} -> {self.strategy_b}"


class Change(BaseModel):
    """Something that the figures depend on, where A and B have not the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    a: str
    b: str
    cells: int
    """In how many pairs."""


class Comparison(BaseModel):
    """All that two runs have in common, and what they have not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: str
    b: str
    pairs: tuple[Pair, ...]
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    older: int
    """Results of the same cells, kept from earlier versions or settings, that were left out."""


class Place(NamedTuple):
    """What pairs cells."""

    task: str
    panel: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.strategy} on {self.panel}, {self.task}"


def compare(a: Path, b: Path, strategies: tuple[str, str] | None = None) -> Comparison:
    """The cells that two output folders of `cachequant bench` have in common.

    strategies: specs; compares the first in A with the second in B instead of each strategy with itself.

    Raises Unreadable for a folder without results, or with damaged ones or those of another version, and Incomparable.
    """
    in_a, older_a = _results(a)
    in_b, older_b = (in_a, 0) if a.resolve() == b.resolve() else _results(b)
    named_a, named_b = in_a, in_b
    if strategies is not None:
        # the two are looked up under one name
        named_a, named_b = (
            {place._replace(strategy=""): result for place, result in each.items() if place.strategy == strategy}
            for each, strategy in zip((in_a, in_b), strategies, strict=True)
        )
    common = [place for place in named_a if place in named_b]
    if not common:
        raise Incomparable(_nothing_common(in_a, in_b, strategies))
    metrics = metrics_of([*named_a.values(), *named_b.values()])
    return Comparison(
        a=str(a),
        b=str(b),
        pairs=tuple(_pair(named_a[place], named_b[place], metrics[place.task.partition(":")[0]]) for place in common),
        changes=tuple(_changes([(named_a[place], named_b[place]) for place in common], strategies is None)),
        only_a=tuple(str(_place(result)) for place, result in named_a.items() if place not in named_b),
        only_b=tuple(str(_place(result)) for place, result in named_b.items() if place not in named_a),
        older=older_a + older_b,
    )


def _results(folder: Path) -> tuple[dict[Place, Result], int]:
    """The results of a folder, one per place, and how many were left out for that."""
    found = sorted(Store(folder).results(), key=lambda result: result.environment.date)
    reported = _reported(folder)
    # the last report knows which of several it showed, else the newest counts
    found.sort(key=lambda result: result.cell.key in reported)
    places = {_place(result): result for result in found}
    return dict(sorted(places.items())), len(found) - len(places)


def _reported(folder: Path) -> set[str]:
    try:
        run = Run.model_validate_json((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()  # killed before it reported, or a report of another version: results alone count
    return {result.cell.key for result in run.results}


def _place(result: Result) -> Place:
    return Place(result.cell.task, result.cell.model.panel, result.cell.strategy)


def _pair(a: Result, b: Result, metrics: Sequence[Metric]) -> Pair:
    pair = Pair(task=a.cell.task, panel=a.cell.model.panel, strategy_a=a.cell.strategy, strategy_b=b.cell.strategy)
    if a.outcome is None or b.outcome is None:
        reasons = [f"failed in {name}: {each.error}" for name, each in (("A", a), ("B", b)) if each.outcome is None]
        return pair.model_copy(update={"failed": tuple(reasons)})
    both = [metric for metric in metrics if metric.name in a.outcome.metrics and metric.name in b.outcome.metrics]
    memory_a, memory_b = (each.memory.model_dump() if each.memory else {} for each in (a.outcome, b.outcome))
    return pair.model_copy(
        update={
            "differences": tuple(_difference(metric, a, b) for metric in both),
            "memory": tuple(_ratios(memory_a, memory_b, WEIGHED)),
            "latency": tuple(_ratios(a.outcome.latency, b.outcome.latency, a.outcome.latency)),
        }
    )


def _difference(metric: Metric, a: Result, b: Result) -> Difference:
    assert a.outcome is not None and b.outcome is not None  # pairs with a failure have no differences
    one, other = a.outcome.metrics[metric.name], b.outcome.metrics[metric.name]
    low, high, how = _interval(metric.name, a, b)
    return Difference(
        metric=metric,
        a=one,
        b=other,
        difference=other - one,
        low=low,
        high=high,
        how=how,
        verdict=_verdict(metric, other - one, low, high, ROUNDING * max(1.0, abs(one), abs(other))),
    )


def _verdict(metric: Metric, difference: float, low: float | None, high: float | None, rounding: float) -> Verdict:
    if abs(difference) <= rounding:
        return "no difference shown"
    if low is None or high is None:
        return "not tested"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == (metric.better == "higher") else "worse"


def _interval(name: str, a: Result, b: Result) -> tuple[float | None, float | None, str]:
    """Both ends, and where they are from."""
    assert a.outcome is not None and b.outcome is not None
    reason = _unpaired(a, b)
    if reason is None:
        column, function = OF_MEANS.get(name, (name, _itself))
        samples = [_column(each, column, function, name) for each in (a, b)]
        if samples[0] is None or samples[1] is None:
            reason = "no mean over samples"
        elif len(samples[0]) < 2:
            reason = "one sample"
        elif len(samples[0]) < FEWEST_SAMPLES:
            low, high = jackknifed(samples[0], samples[1], function)
            return low, high, f"paired, Student's t over {len(samples[0])} samples"
        else:
            low, high = paired(samples[0], samples[1], function)
            return low, high, f"paired bootstrap over {len(samples[0])} samples"
    errors = [each.outcome.errors.get(name) for each in (a, b) if each.outcome]
    if errors[0] is None or errors[1] is None:
        return None, None, reason
    difference = b.outcome.metrics[name] - a.outcome.metrics[name]
    fewest = min(len(each.outcome.samples) for each in (a, b) if each.outcome)
    return *unpaired(difference, errors[0], errors[1], fewest), f"unpaired, from standard errors ({reason})"


def _unpaired(a: Result, b: Result) -> str | None:
    """Why line n of one's samples is not the question of line n of the other's; None where it is."""
    assert a.outcome is not None and b.outcome is not None
    for what, one, other in (
        ("inputs", a.cell.inputs, b.cell.inputs),
        ("settings", a.cell.settings, b.cell.settings),
        ("exact newest tokens", a.cell.residual_length, b.cell.residual_length),
        ("numbers of samples", len(a.outcome.samples), len(b.outcome.samples)),
    ):
        if one != other:
            return f"other {what}"
    return None


def _column(result: Result, column: str, function: Callable[[Any], Any], name: str) -> np.ndarray | None:
    """A column of the samples, if the metric is `function` of its mean."""
    assert result.outcome is not None
    values = [sample.get(column) for sample in result.outcome.samples]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return None
    metric = result.outcome.metrics[name]
    return np.asarray(numbers) if math.isclose(function(fmean(numbers)), metric, rel_tol=1e-6, abs_tol=1e-9) else None


def _itself(value: Any) -> Any:
    return value


def _ratios(a: Mapping[str, float], b: Mapping[str, float], names: Iterable[str]) -> Iterable[Ratio]:
    for name in names:
        if name in a and name in b and (a[name] or b[name]):
            yield Ratio(name=name, a=a[name], b=b[name], ratio=b[name] / a[name] if a[name] else None)


def _changes(pairs: Sequence[tuple[Result, Result]], same_strategies: bool) -> list[Change]:
    counts: dict[tuple[str, str, str], int] = {}
    for a, b in pairs:
        one, other = (_conditions(each, same_strategies) for each in (a, b))
        for what in dict.fromkeys([*one, *other]):
            values = (str(one.get(what, "-")), str(other.get(what, "-")))
            if values[0] != values[1]:
                counts[what, *values] = counts.get((what, *values), 0) + 1
    return [Change(what=what, a=a, b=b, cells=cells) for (what, a, b), cells in counts.items()]


def _conditions(result: Result, contents: bool) -> dict[str, Any]:
    """What figures depend on. contents: of the strategy too, and its calibration."""
    cell = result.cell
    found: dict[str, Any] = {**result.environment.model_dump(exclude={"date"}), "residual length": cell.residual_length}
    found |= {f"sources of {name}": cell.versions[name] for name in ("code", "plugins") if cell.versions.get(name)}
    found |= {f"model {name}": value for name, value in cell.model.model_dump(exclude={"panel"}).items()}
    found |= {f"input {name}": value for name, value in cell.inputs.items()}
    found |= {f"task {name}": value for name, value in cell.settings.items()}
    if contents:
        found |= {f"{cell.family} {name}": value for name, value in cell.contents.items()}
        found |= {f"calibrated on {name}": value for name, value in (cell.calibrated_on or {}).items()}
        learned = result.calibration.model_dump(exclude={"seconds"}) if result.calibration else {}
        found |= {f"calibration {name}": value for name, value in learned.items()}
    return found


def _nothing_common(a: Mapping[Place, Result], b: Mapping[Place, Result], strategies: tuple[str, str] | None) -> str:
    wanted = f" with {strategies[0]!r} in A and {strategies[1]!r} in B" if strategies else ""
    has = "; ".join(
        f"{name} has tasks {_list(place.task for place in each)} on {_list(place.panel for place in each)} "
        f"with {_list(place.strategy for place in each)}"
        for name, each in (("A", a), ("B", b))
    )
    return f"no task on the same model{wanted} is in both; {has}"


def _list(names: Iterable[str], most: int = 12) -> str:
    found = list(dict.fromkeys(names))
    return (
        ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "") if found else "none"
    )
