"""A leaderboard as terminal table, Markdown, CSV, JSON and picture."""

import csv
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..leaderboard import Leaderboard, Row

PARETO = "*"
SPEC_WIDTH = 44


def group(board: Leaderboard) -> list[tuple[str, dict[str, Row]]]:
    """Rows by strategy and panel, smallest caches first, failures last."""
    groups: dict[str, dict[str, Row]] = {}
    for row in board.rows:
        groups.setdefault(row.strategy, {})[row.panel] = row
    return sorted(groups.items(), key=lambda item: (_bits(item[1]), item[0]))


def terminal_tables(board: Leaderboard, width: int) -> list[Table]:
    """For rich: one line per strategy, Pareto-optimal divergences marked; one table per model if `width` is short."""
    every = [card.panel for card in board.models]
    parts = [every] if width >= SPEC_WIDTH + 26 + 44 * len(every) else [[panel] for panel in every]
    tables = []
    for panels in parts:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("\nstrategy", overflow="fold", min_width=20)
        for heading in ("bits", "packed", "vs 16-bit"):
            table.add_column(f"\n{heading}", justify="right", no_wrap=True)
        for panel in panels:
            for heading in (f"{escape(panel)}\nperplexity", "\nKL mean", "\nKL p99", "\ntop-1"):
                table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading.split("\n")[1]))
        for spec, rows in group(board):
            cells = _cells(rows, panels, "[bold green]" + PARETO + " {}[/]")
            table.add_row(escape(spec), *cells, style="dim" if any(row.error for row in rows.values()) else "")
        tables.append(table)
    return tables


def markdown(board: Leaderboard) -> str:
    """A GitHub table with the conditions under it."""
    panels = [card.panel for card in board.models]
    headings = ["strategy", "bits per element", "packed part", "vs 16-bit"]
    headings += [f"{panel}: {name}" for panel in panels for name in ("perplexity", "KL mean", "KL p99", "top-1")]
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1)]
    lines += [[f"`{spec}`", *_cells(rows, panels, "**{}**")] for spec, rows in group(board)]
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts.append("Bold: on the Pareto front of bits per element and mean KL of its model.")
    if failed := failures(board):
        parts.append("\n".join(f"- failed: {each}" for each in failed))
    return "\n\n".join([*parts, *describe(board).splitlines()]) + "\n"


def failures(board: Leaderboard) -> list[str]:
    """One line per row without figures."""
    return [f"{row.strategy} on {row.panel}: {row.error}" for row in board.rows if row.error]


def describe(board: Leaderboard) -> str:
    """The conditions without which the figures mean nothing."""
    protocol = board.protocol
    models = "; ".join(
        f"{card.panel}: {card.architecture}, {card.parameters / 1e6:.1f}M parameters, {card.dtype}, "
        f"context {card.context}"
        for card in board.models
    )
    lines = [
        f"Streaming: {protocol.windows} windows of {protocol.length} tokens in one batch, {protocol.prefill} of "
        f"prefill in one pass, then {protocol.chunk} a pass; {protocol.scored} tokens scored per model, newest "
        f"{protocol.residual_length} kept exact.",
        "Bits as held at the end of the windows, all included; vs 16-bit: how many times smaller than a 16-bit cache.",
        f"KL to the unquantized model in nats per token. {models}.",
        f"Text: {board.text.name}, sha256 {board.text.sha256[:12]}. {board.environment}.",
        *_calibrations(board),
        *_host_copies(board),
        *board.notes,
    ]
    return "\n".join(lines)


def _calibrations(board: Leaderboard) -> list[str]:
    """One line for those that had to learn from a text before; rows that read the same statistics share a card."""
    learned = [row for row in board.rows if row.calibration]
    if not learned:
        return []
    cards = {(row.panel, row.calibration): row.calibration for row in learned if row.calibration}.values()
    texts = dict.fromkeys(
        f"{card.windows} windows of {card.length} tokens of the text {card.text}, sha256 {card.sha256[:12]}"
        for card in cards
    )
    specs = ", ".join(dict.fromkeys(row.strategy for row in learned))
    return [
        f"Calibrated for each model first, on {'; '.join(texts)}; {len(cards)} calibrations took "
        f"{sum(card.seconds for card in cards):.0f} s: {specs}."
    ]


def _host_copies(board: Leaderboard) -> list[str]:
    """One line for those that keep exact copies outside the device, which their bits do not count."""
    sizes = {row.strategy: row.memory.host_bytes for row in board.rows if row.memory and row.memory.host_bytes}
    if not sizes:
        return []
    named = ", ".join(f"{strategy} {size / 2**20:.1f} MiB" for strategy, size in sizes.items())
    return [f"Kept in host memory beside these bits: {named}."]


def write_json(board: Leaderboard, folder: Path) -> None:
    """`leaderboard.json`; a reader sees the old file or the new one, never half of one."""
    _replace(folder / "leaderboard.json", board.model_dump_json(indent=2) + "\n")


def write_all(board: Leaderboard, folder: Path) -> list[Path]:
    """All files of a leaderboard; returns their paths."""
    # imported here: a leaderboard can be run and printed without matplotlib
    from .chart import draw

    write_json(board, folder)
    _replace(folder / "leaderboard.csv", _csv(board))
    _replace(folder / "leaderboard.md", markdown(board))
    draw(board, folder / "leaderboard.png")
    return [folder / f"leaderboard.{kind}" for kind in ("json", "csv", "md", "png")]


def _csv(board: Leaderboard) -> str:
    lines = [_flat(row) for row in board.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    line = row.model_dump(exclude={"memory", "accuracy", "calibration"})
    for name in ("memory", "accuracy", "calibration"):
        part = getattr(row, name)
        line |= {f"{name}_{field}": value for field, value in part.model_dump().items()} if part else {}
    return line


def _bits(rows: dict[str, Row]) -> float:
    held = [row.memory.bits_per_element for row in rows.values() if row.memory]
    return min(held, default=float("inf"))


def _cells(rows: dict[str, Row], panels: list[str], optimal: str) -> list[str]:
    """Figures of one strategy; `optimal` formats Pareto-optimal divergences."""
    held = [rows[panel].memory for panel in panels if panel in rows]
    sizes = [
        (
            f"{memory.bits_per_element:.2f}",
            f"{memory.packed_bits_per_element:.2f}",
            f"{16 / memory.bits_per_element:.2f}x",
        )
        for memory in held
        if memory is not None
    ]
    # one figure, or one per panel where a strategy decides by what it sees
    cells = [" / ".join(dict.fromkeys(column)) for column in zip(*sizes, strict=True)] or ["-"] * 3
    for panel in panels:
        row = rows.get(panel)
        if row is None or row.accuracy is None:
            cells += ["failed" if row and row.error else "-", "-", "-", "-"]
            continue
        accuracy = row.accuracy
        perplexity = f"{accuracy.perplexity:.2f}" if accuracy.perplexity < 1e5 else f"{accuracy.perplexity:.1e}"
        mean = _nats(accuracy.kl_mean)
        cells += [perplexity, optimal.format(mean) if row.pareto else mean, _nats(accuracy.kl_p99)]
        cells.append(f"{accuracy.top1:.1%}")
    return cells


def _nats(value: float) -> str:
    if value == 0 or value >= 1e-4:
        return f"{value:.4f}" if value < 10 else f"{value:.1f}"
    return f"{value:.0e}"


def _replace(path: Path, text: str) -> None:
    """Write `path` in one step, from a file beside it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files for the owner's eyes only
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
