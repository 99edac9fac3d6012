"""Sheets as tables, for terminals and for Markdown."""

import io

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..tasks.base import Metric
from .sheet import Line, Sheet, grouped

PARETO = "*"
SPEC_WIDTH, NARROWEST_SPEC = 44, 20
FIGURE_WIDTH = 11
SIZES = ("bits", "packed", "vs 16-bit")


def terminal_tables(sheet: Sheet, width: int) -> list[Table]:
    """For rich: one line per strategy, Pareto-optimal figures marked.

    Where `width` is short there is one table per model; where that is too wide still, the packed part is left out, and
    then the metrics are divided over several.
    """
    wide = SPEC_WIDTH + 26 + FIGURE_WIDTH * len(sheet.metrics) * len(sheet.panels)
    parts = [sheet.panels] if width >= wide else [(panel,) for panel in sheet.panels]
    return [table for panels in parts for table in _fitting(sheet, panels, sheet.metrics, width)]


def _fitting(sheet: Sheet, panels: tuple[str, ...], metrics: tuple[Metric, ...], width: int) -> list[Table]:
    unlimited = Console(width=10_000, file=io.StringIO())
    # rich takes long words for unbreakable, but specs are folded
    longest = max((len(word) for line in sheet.lines for word in line.strategy.split()), default=0)
    foldable = max(0, longest - NARROWEST_SPEC)
    for sizes in (SIZES, ("bits", "vs 16-bit")):
        table = _terminal_table(sheet, panels, metrics, sizes)
        if unlimited.measure(table).minimum - foldable <= width:
            return [table]
    if len(metrics) < 2:
        return [table]
    half = (len(metrics) + 1) // 2
    return [
        *_fitting(sheet, panels, metrics[:half], width),
        *_fitting(sheet, panels, metrics[half:], width),
    ]


def markdown_table(sheet: Sheet) -> str:
    """A GitHub table."""
    headings = ["strategy", "bits per element", "packed part", "vs 16-bit"]
    headings += [f"{panel}: {metric.label}" for panel in sheet.panels for metric in sheet.metrics]
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1)]
    # a bar would end the cell
    rows = [(spec.replace("|", "\\|"), found) for spec, found in grouped(sheet)]
    lines += [
        [f"`{spec}`", *_cells(found, sheet.panels, sheet.metrics, sheet.headline, "**{}**")] for spec, found in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(sheet: Sheet) -> list[str]:
    """One line per row without figures."""
    return [f"{line.strategy} on {line.panel}: {line.error}" for line in sheet.lines if line.error]


def figure(metric: Metric, value: float | None) -> str:
    """As it is written in tables."""
    if value is None:
        return "-"
    if metric.percent:
        return f"{value:.{metric.digits}%}"
    if value and abs(value) < 10**-metric.digits:
        return f"{value:.0e}"
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{metric.digits if abs(value) < 10 else min(metric.digits, 2)}f}"


def _terminal_table(
    sheet: Sheet, panels: tuple[str, ...], metrics: tuple[Metric, ...], sizes: tuple[str, ...]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nstrategy", overflow="fold", min_width=NARROWEST_SPEC)
    for heading in sizes:
        table.add_column(f"\n{heading}", justify="right", no_wrap=True)
    for panel in panels:
        for place, metric in enumerate(metrics):
            heading = f"{escape(panel) if place == 0 else ''}\n{metric.label}"
            table.add_column(heading, justify="right", no_wrap=True, min_width=len(metric.label))
    for spec, lines in grouped(sheet):
        cells = _cells(lines, panels, metrics, sheet.headline, "[bold green]" + PARETO + " {}[/]")
        shown = [cell for name, cell in zip(SIZES, cells, strict=False) if name in sizes] + cells[len(SIZES) :]
        failed = any(line.error for line in lines.values())
        baseline = any(line.baseline for line in lines.values())
        table.add_row(escape(spec), *shown, style="dim" if failed else "italic" if baseline else "")
    return table


def _cells(
    lines: dict[str, Line], panels: tuple[str, ...], metrics: tuple[Metric, ...], headline: Metric, optimal: str
) -> list[str]:
    """Figures of one strategy; `optimal` formats the headline of Pareto-optimal ones."""
    held = [memory for panel in panels if panel in lines and (memory := lines[panel].memory) is not None]
    sizes = [
        (
            f"{memory.bits_per_element:.2f}",
            f"{memory.packed_bits_per_element:.2f}",
            f"{16 / memory.bits_per_element:.2f}x" if memory.bits_per_element else "-",
        )
        for memory in held
    ]
    # one figure, or one per panel where a strategy decides by what it sees
    cells = [" / ".join(dict.fromkeys(column)) for column in zip(*sizes, strict=True)] or ["-"] * len(SIZES)
    for panel in panels:
        line = lines.get(panel)
        if line is None or line.error:
            cells += ["failed" if line else "-", *["-"] * (len(metrics) - 1)]
            continue
        for metric in metrics:
            written = figure(metric, line.metrics.get(metric.name))
            cells.append(optimal.format(written) if line.pareto and metric == headline else written)
    return cells
