"""What a table, a chart or a page shows: strategies by models under one task, however they were measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..contenders import BASELINES
from ..held import Memory
from ..leaderboard import Leaderboard
from ..metrics import pareto_front
from ..sweep.cells import Result
from ..tasks.base import Metric
from ..tasks.perplexity import Perplexity


@dataclass(frozen=True)
class Line:
    """One strategy on one model."""

    strategy: str
    panel: str
    memory: Memory | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors."""
    error: str | None = None
    """Why there are no figures."""
    pareto: bool = False
    """No other line of the panel has at most its bits and is at least as good, one of them better."""

    @property
    def family(self) -> str:
        """The name of the strategy."""
        return self.strategy.partition(":")[0]

    @property
    def baseline(self) -> bool:
        """Whether it is a cache of transformers."""
        return self.family in BASELINES


@dataclass(frozen=True)
class Sheet:
    """The lines of one task."""

    task: str
    panels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    """The first is the one that ranks."""
    lines: tuple[Line, ...]

    @property
    def headline(self) -> Metric:
        """What ranks. A task none of whose cells has figures has none."""
        return self.metrics[0] if self.metrics else Metric(name="", label="-", better="lower")


def of_leaderboard(board: Leaderboard) -> Sheet:
    """The rows of a leaderboard made without a sweep."""
    lines = [
        Line(
            row.strategy,
            row.panel,
            row.memory,
            row.accuracy.model_dump(exclude={"tokens"}) if row.accuracy else {},
            error=row.error,
        )
        for row in board.rows
    ]
    panels = tuple(card.panel for card in board.models)
    return Sheet("perplexity", panels, Perplexity.metrics, marked(lines, Perplexity.metrics[0]))


def of_results(results: Iterable[Result], metrics: dict[str, tuple[Metric, ...]]) -> list[Sheet]:
    """One sheet per task, in the order of the results. metrics: of each task's name."""
    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(result.cell.task, []).append(result)
    return [_sheet(task, found, metrics[task.partition(":")[0]]) for task, found in by_task.items()]


def grouped(sheet: Sheet) -> list[tuple[str, dict[str, Line]]]:
    """Lines by strategy and panel, smallest caches first, failures last."""
    groups: dict[str, dict[str, Line]] = {}
    for line in sheet.lines:
        groups.setdefault(line.strategy, {})[line.panel] = line
    return sorted(groups.items(), key=lambda item: (_bits(item[1].values()), item[0]))


def _sheet(task: str, results: Sequence[Result], metrics: tuple[Metric, ...]) -> Sheet:
    lines = []
    for result in results:
        outcome = result.outcome
        lines.append(
            Line(
                result.cell.strategy,
                result.cell.model.panel,
                outcome.memory if outcome else None,
                outcome.metrics if outcome else {},
                outcome.errors if outcome else {},
                result.error,
            )
        )
    panels = tuple(dict.fromkeys(line.panel for line in lines))
    known = tuple(metric for metric in metrics if any(metric.name in line.metrics for line in lines)) or metrics
    return Sheet(task, panels, known, marked(lines, known[0]) if known else tuple(lines))


def marked(lines: list[Line], metric: Metric) -> tuple[Line, ...]:
    """The lines with `pareto` set panel by panel, on device bits and `metric`."""
    found = list(lines)
    sign = 1 if metric.better == "lower" else -1
    for panel in {line.panel for line in lines}:
        places = [
            (place, (line.memory.bits_per_element, sign * line.metrics[metric.name]))
            for place, line in enumerate(lines)
            if line.panel == panel and line.memory and metric.name in line.metrics and _was_read(line)
        ]
        front = pareto_front([point for _, point in places])
        for (place, _), optimal in zip(places, front, strict=True):
            found[place] = replace(found[place], pareto=optimal)
    return tuple(found)


def _was_read(line: Line) -> bool:
    """Whether what a strategy packed had anything to do with its figures, as far as the task says."""
    return line.baseline or line.metrics.get("packed_share", 1.0) > 0


def _bits(lines: Iterable[Line]) -> float:
    return min((line.memory.bits_per_element for line in lines if line.memory), default=float("inf"))
