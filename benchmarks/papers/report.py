"""A reproduction as terminal table, Markdown and JSON."""

from itertools import groupby
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from .figures import Paper
from .reproduce import TOLERANCE, Line, Ordering, Reproduction

HEADINGS = ("ours", "paper", "diff", f"±{TOLERANCE}", "bits", "packed", "paper bits")


def terminal_table(result: Reproduction, title: str, number: int) -> Table:
    """One of the paper's tables."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(title), title_justify="left")
    table.add_column("row", overflow="fold", min_width=16)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in result.lines:
        if line.table == number:
            table.add_row(escape(line.row), *_cells(line), style="dim" if line.ours.error else "")
    return table


def markdown(result: Reproduction, paper: Paper) -> str:
    """GitHub tables with the conditions under them."""
    parts = [f"# {result.title}", f"{result.source}, on {_model(result)}."]
    titles = {table.number: _title(paper, table.number) for table in paper.tables}
    for number, group in groupby(result.lines, key=lambda line: line.table):
        rows = [["row", *HEADINGS, "strategy"], ["---"] + ["---:"] * len(HEADINGS) + ["---"]]
        lines = list(group)
        for line in lines:
            note = f" ({line.differs})" if line.differs else ""
            rows.append([line.row, *_cells(line), f"`{line.spec}`{note}" if line.spec else "-"])
        parts += [f"## {titles[number]}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        parts.append("\n".join(f"- no figure: {line.row}: {line.ours.error}" for line in lines if line.ours.error))
        parts.append(orderings_text(result.orderings, number))
    return "\n\n".join([*(part for part in parts if part), "## How", *describe(result)]) + "\n"


def orderings_text(orderings: tuple[Ordering, ...], number: int) -> str:
    """How many of the paper's orderings hold, and which do not, the largest difference first."""
    here = [each for each in orderings if each.table == number]
    if not here:
        return ""
    count = {verdict: [each for each in here if each.verdict == verdict] for verdict in ("holds", "ties", "broken")}
    text = f"Orderings that the paper has on all its models: {len(count['holds'])} of {len(here)} hold"
    text += f", {len(count['ties'])} tie" if count["ties"] else ""
    broken = sorted(count["broken"], key=lambda each: each.ours[1] - each.ours[0])
    if not broken:
        return text + "."
    pairs = [f"{each.better} ({each.ours[0]:.4f}) before {each.worse} ({each.ours[1]:.4f})" for each in broken]
    return f"{text}; not {', '.join(pairs)}."


def describe(result: Reproduction) -> list[str]:
    """The conditions without which the figures mean nothing, a paragraph each."""
    protocol = result.protocol
    possible = result.text.tokens // protocol.length
    windows = f"all {possible}" if protocol.windows == possible else f"{protocol.windows} of {possible}"
    calibrations = {line.ours.calibration_seconds for line in result.lines if line.ours.calibration_seconds is not None}
    seconds = f" ({sum(calibrations):.0f} s in total)" if calibrations else ""
    return [
        "The paper's protocol: the text is one stream of tokens, cut into windows of "
        f"{protocol.length} that follow each other without overlap; {windows} were read. In one forward per window "
        "every query reads every key and value, its own included, as what its codes stand for; only sinks are exact. "
        "Perplexity is exp of the mean loss of all tokens but the first of each window, "
        f"{protocol.windows * (protocol.length - 1)} in total. It is not our streaming protocol, in which the newest "
        "tokens are exact.",
        f"Calibration on {protocol.samples} windows of {protocol.length} tokens, once for all strategies that need the "
        f"same statistics{seconds}.",
        "ours, paper: perplexity. bits: per number, of a cache that holds one window, sinks, tables and rotary angles "
        "included. packed: codes, scales and outliers alone. paper bits: its own accounting, over its models.",
        *(f"Differs from the paper: {difference}" for difference in result.differences),
        f"Model: {_model(result)}. Text: {result.text.name}, sha256 {result.text.sha256[:12]}. Calibration text: "
        f"{result.calibration_text.name}, sha256 {result.calibration_text.sha256[:12]}. {result.environment}.",
        *result.notes,
    ]


def write(result: Reproduction, paper: Paper, folder: Path, name: str) -> list[Path]:
    """`<name>.md` and `<name>.json`."""
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    for path, text in zip(paths, (markdown(result, paper), result.model_dump_json(indent=2) + "\n"), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _title(paper: Paper, number: int) -> str:
    table = next(table for table in paper.tables if table.number == number)
    read = "" if table.evidence == "paper" else " (the paper's figures from secondary sources)"
    return f"Table {table.number}: {table.title}{read}"


def _model(result: Reproduction) -> str:
    card = result.model
    beside = f", beside the paper's {result.paper_model}" if result.paper_model else ", which the paper does not have"
    return f"{card.panel} ({card.architecture}, {card.parameters / 1e6:.1f}M parameters, {card.dtype}{beside})"


def _cells(line: Line) -> list[str]:
    ours, bits = line.ours, line.paper_bits
    within = "" if line.reproduced is None else "yes" if line.reproduced else "no"
    missing = "not run" if line.spec is None else "failed"
    value = missing if ours.error else _number(ours.perplexity, 4)
    spread = "" if bits is None else f"{bits[0]:.2f}" if bits[0] == bits[1] else f"{bits[0]:.2f}-{bits[1]:.2f}"
    signed = "" if line.difference is None else f"{line.difference:+.2f}"
    return [value, _number(line.paper, 2), signed, within, _number(ours.bits, 2), _number(ours.packed_bits, 2), spread]


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value < 1e4 else f"{value:.2e}"
