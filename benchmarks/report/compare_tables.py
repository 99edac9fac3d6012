"""A comparison as tables, for terminals and for Markdown."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.markup import escape
from rich.table import Table

from ..tasks.base import Metric
from .compare import Comparison, Difference, Pair, Ratio
from .tables import figure

HEADINGS = ("strategy", "figure", "A", "B", "B - A", "95 % interval", "B is")
POINTS = " pp"
BITS, MEBIBYTES, MILLISECONDS = (1, ""), (2**20, " MiB"), (1, " ms")
STYLES = {"better": "green", "worse": "red", "no difference shown": "", "not tested": "dim"}
WORDS = {
    "bits_per_element": "bits held",
    "packed_bits_per_element": "packed bits",
    "device_bytes": "device bytes",
    "host_bytes": "host bytes",
}


def terminal_tables(comparison: Comparison) -> Iterator[tuple[str, list[tuple[str, Table]]]]:
    """For rich: of each task and model its heading, and under it the strategies' names and tables."""
    for heading, pairs in _grouped(comparison.pairs):
        yield heading, [(pair.name, _table(pair)) for pair in pairs]


def markdown(comparison: Comparison) -> str:
    """Tables with everything that has to be known beside them."""
    parts = [f"A: `{comparison.a}`, B: `{comparison.b}`."]
    for heading, pairs in _grouped(comparison.pairs):
        lines = [list(HEADINGS), ["---", "---", "---:", "---:", "---:", "---:", "---"]]
        for pair in pairs:
            lines += [[f"`{line[0]}`" if line[0] else "", *line[1:]] for line, _ in _lines(pair)]
        text = "\n".join(f"| {' | '.join(_piped(cell) for cell in line)} |" for line in lines)
        parts += [f"### `{heading}`", text]
    parts += [f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in notes(comparison)]
    return "\n\n".join(parts) + "\n"


def notes(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What has to be known beside the tables: titles and lines."""
    found = [
        (
            "Failed",
            [f"{pair.name} on {pair.panel}, {pair.task}: {each}" for pair in comparison.pairs for each in pair.failed],
        ),
        ("Intervals", _intervals(comparison)),
        (
            "What differs in the conditions",
            [
                f"{change.what}: {change.a} -> {change.b}"
                + ("" if change.cells == len(comparison.pairs) else f" ({change.cells} of {len(comparison.pairs)})")
                for change in comparison.changes
            ],
        ),
        ("Only in A", list(comparison.only_a)),
        ("Only in B", list(comparison.only_b)),
    ]
    if comparison.older:
        found.append(("Left out", [f"{comparison.older} older results of the same strategies, tasks and models"]))
    return [(title, lines) for title, lines in found if lines]


def _table(pair: Pair) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(HEADINGS[1], no_wrap=True)
    for name in HEADINGS[2:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(HEADINGS[-1], min_width=10)
    for line, style in _lines(pair):
        table.add_row(*map(escape, line[1:]), style=style)
    return table


def _intervals(comparison: Comparison) -> list[str]:
    """Where they are from, and for which figures there is none."""
    counts: dict[str, list[str]] = {}
    for pair in comparison.pairs:
        for each in pair.differences:
            known = each.how if each.low is not None else f"none: {each.how}"
            counts.setdefault(known, []).append(each.metric.label)
    return [f"{how} ({', '.join(dict.fromkeys(labels))})" for how, labels in counts.items()]


def _grouped(pairs: Iterable[Pair]) -> list[tuple[str, list[Pair]]]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(f"{pair.task} on {pair.panel}", []).append(pair)
    return list(groups.items())


def _lines(pair: Pair) -> Iterator[tuple[list[str], str]]:
    """Cells and style; the strategy stands in the first line alone."""
    lines = [([each.metric.label, *_difference(each)], STYLES[each.verdict]) for each in pair.differences]
    lines += [
        ([WORDS[each.name], *_ratio(each, BITS if "bits" in each.name else MEBIBYTES)], "") for each in pair.memory
    ]
    lines += [([each.name, *_ratio(each, MILLISECONDS)], "") for each in pair.latency]
    if pair.failed:
        lines = [(["failed", "-", "-", "-", "-", "-"], "dim")]
    for number, (cells, style) in enumerate(lines):
        yield [pair.name if number == 0 else "", *cells], style


def _difference(each: Difference) -> list[str]:
    interval = "-"
    if each.low is not None and each.high is not None:
        interval = f"{_signed(each.metric, each.low).removesuffix(POINTS)} to {_signed(each.metric, each.high)}"
    values = [figure(each.metric, value) for value in (each.a, each.b)]
    return [*values, _signed(each.metric, each.difference), interval, each.verdict]


def _signed(metric: Metric, value: float) -> str:
    """Differences of shares in percentage points."""
    return f"{100 * value:+.{metric.digits + 1}f}{POINTS}" if metric.percent else f"{value:+.2g}"


def _ratio(each: Ratio, unit: tuple[float, str]) -> list[str]:
    size, name = unit
    values = [f"{value / size:.2f}{name}" for value in (each.a, each.b)]
    return [*values, "-" if each.ratio is None else f"{each.ratio:.3f}x", "", ""]


def _piped(cell: str) -> str:
    return cell.replace("|", "\\|")
