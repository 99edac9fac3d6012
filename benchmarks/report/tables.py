"""Sheets as tables, for terminals and for Markdown."""

from rich import box
from rich.markup import escape
from rich.table import Table

from ..tasks.base import Metric
from .sheet import Line, Sheet, grouped

PARETO = "*"
SPEC_WIDTH = 44
FIGURE_WIDTH = 11


def terminal_tables(sheet: Sheet, width: int) -> list[Table]:
    """For rich: one line per strategy, Pareto-optimal figures marked; one table per model if `width` is short."""
    wide = SPEC_WIDTH + 26 + FIGURE_WIDTH * len(sheet.metrics) * len(sheet.panels)
    parts = [sheet.panels] if width >= wide else [(panel,) for panel in sheet.panels]
    tables = []
    for panels in parts:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("\nstrategy", overflow="fold", min_width=20)
        for heading in ("bits", "packed", "vs 16-bit"):
            table.add_column(f"\n{heading}", justify="right", no_wrap=True)
        for panel in panels:
            for place, metric in enumerate(sheet.metrics):
                heading = f"{escape(panel) if place == 0 else ''}\n{metric.label}"
                table.add_column(heading, justify="right", no_wrap=True, min_width=len(metric.label))
        for spec, lines in grouped(sheet):
            cells = _cells(sheet, lines, panels, "[bold green]" + PARETO + " {}[/]")
            failed = any(line.error for line in lines.values())
            baseline = any(line.baseline for line in lines.values())
            table.add_row(escape(spec), *cells, style="dim" if failed else "italic" if baseline else "")
        tables.append(table)
    return tables


def markdown_table(sheet: Sheet) -> str:
    """A GitHub table."""
    headings = ["strategy", "bits per element", "packed part", "vs 16-bit"]
    headings += [f"{panel}: {metric.label}" for panel in sheet.panels for metric in sheet.metrics]
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1)]
    lines += [[f"`{spec}`", *_cells(sheet, found, sheet.panels, "**{}**")] for spec, found in grouped(sheet)]
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


def _cells(sheet: Sheet, lines: dict[str, Line], panels: tuple[str, ...], optimal: str) -> list[str]:
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
    cells = [" / ".join(dict.fromkeys(column)) for column in zip(*sizes, strict=True)] or ["-"] * 3
    for panel in panels:
        line = lines.get(panel)
        if line is None or line.error:
            cells += ["failed" if line else "-", *["-"] * (len(sheet.metrics) - 1)]
            continue
        figures = [figure(metric, line.metrics.get(metric.name)) for metric in sheet.metrics]
        cells += [optimal.format(figures[0]) if line.pareto else figures[0], *figures[1:]]
    return cells
