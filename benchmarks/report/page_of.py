"""A run as the data of its page."""

from collections.abc import Iterable

from ...registry import tasks
from ..sweep.cells import Result
from ..tasks.base import Metric
from .chart import short_label
from .page import LayerBits, MetricInfo, Page, PageMemory, PageRow, Panel, RetrievalMap, TaskInfo
from .run import Run, conditions
from .sheet import Line, Sheet


def page_of(run: Run) -> Page:
    """All results of `run`; a figure that is not there is left out."""
    sheets = run.sheets()
    by_cell = {(each.cell.task, each.cell.strategy, each.cell.model.panel): each for each in run.results}
    environment = run.environment
    return Page(
        title="KV-cache quantization: accuracy against memory",
        created=environment.date,
        environment={name: str(value) for name, value in environment.model_dump().items() if value is not None},
        notes=tuple(conditions(run)),
        panels=tuple(
            Panel(
                name=card.panel,
                details=f"{card.architecture}, {card.parameters / 1e6:.1f}M parameters, {card.layers} layers, "
                f"{card.dtype}, context {card.context}",
            )
            for card in run.models
        ),
        tasks=tuple(_task(sheet) for sheet in sheets),
        rows=tuple(
            _row(line, by_cell[sheet.task, line.strategy, line.panel], sheet)
            for sheet in sheets
            for line in sheet.lines
        ),
        layers=tuple(_layers(run.results)),
        maps=tuple(_maps(run.results, {sheet.task: sheet.headline.name for sheet in sheets})),
    )


def _task(sheet: Sheet) -> TaskInfo:
    name, _, settings = sheet.task.partition(":")
    try:
        note = tasks.describe(name).summary
    except LookupError:
        note = ""
    title = f"{name} ({settings.replace(',', ', ').replace('=', ' ')})" if settings else name
    return TaskInfo(id=sheet.task, title=title, note=note, metrics=tuple(map(_metric, sheet.metrics)))


def _metric(metric: Metric) -> MetricInfo:
    return MetricInfo(**metric.model_dump())


def _row(line: Line, result: Result, sheet: Sheet) -> PageRow:
    outcome, memory = result.outcome, line.memory
    known = {metric.name for metric in sheet.metrics}
    short = short_label(line.strategy)
    return PageRow(
        strategy=line.strategy,
        label=line.strategy if line.baseline or short == line.family else f"{line.family} {short}",
        family=line.family,
        baseline=line.baseline,
        panel=line.panel,
        task=sheet.task,
        status="failed" if line.error else "ok",
        error=line.error,
        metrics={name: value for name, value in line.metrics.items() if name in known},
        errors={name: value for name, value in line.errors.items() if name in known & line.metrics.keys()},
        memory=memory
        and PageMemory(
            bits_per_element=memory.bits_per_element,
            packed_bits_per_element=memory.packed_bits_per_element,
            device_bytes=memory.device_bytes,
            host_bytes=memory.host_bytes,
            kinds=outcome.kinds if outcome else {},
        ),
        latency=outcome.latency if outcome else {},
        seconds=result.seconds,
        predictions=f"cells/{result.cell.folder}/predictions.csv" if outcome and outcome.samples else None,
        pareto=line.pareto,
    )


def _layers(results: Iterable[Result]) -> Iterable[LayerBits]:
    """Of the first task that saw them."""
    seen = set()
    for result in results:
        place = (result.cell.strategy, result.cell.model.panel)
        if result.outcome and result.outcome.layers and place not in seen:
            seen.add(place)
            layers = tuple((layer.index, layer.key, layer.value) for layer in result.outcome.layers)
            yield LayerBits(strategy=place[0], panel=place[1], layers=layers)


def _maps(results: Iterable[Result], headlines: dict[str, str]) -> Iterable[RetrievalMap]:
    """Of tasks whose samples have a length, a depth and the figure that ranks; all lengths of one task are one map.

    headlines: names of the figures that rank, by task.
    """
    found: dict[tuple[str, str, str], dict[tuple[int, float], list[float]]] = {}
    first: dict[str, str] = {}
    for result in results:
        for sample in result.outcome.samples if result.outcome else ():
            length, depth, hit = (sample.get(name) for name in ("length", "depth", headlines[result.cell.task]))
            if isinstance(length, str | None) or isinstance(depth, str | None) or isinstance(hit, str | None):
                continue
            task = first.setdefault(result.cell.task.partition(":")[0], result.cell.task)
            place = (result.cell.strategy, result.cell.model.panel, task)
            found.setdefault(place, {}).setdefault((int(length), depth), []).append(hit)
    for (strategy, panel, task), cells in found.items():
        lengths = tuple(sorted({length for length, _ in cells}))
        depths = tuple(sorted({depth for _, depth in cells}))
        values = tuple(
            tuple(sum(hits) / len(hits) if (hits := cells.get((length, depth))) else None for depth in depths)
            for length in lengths
        )
        yield RetrievalMap(strategy=strategy, panel=panel, task=task, rows=lengths, columns=depths, values=values)
