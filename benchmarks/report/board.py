"""A leaderboard made without a sweep, as Markdown, CSV, JSON and picture."""

from pathlib import Path
from typing import Any

from ..leaderboard import Leaderboard, Row
from .files import csv_text, replace
from .sheet import of_leaderboard
from .tables import failures, markdown_table

FRONT = "Bold: on the Pareto front of bits per element and mean KL of its model."


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


def markdown(board: Leaderboard) -> str:
    """The table with the conditions under it."""
    sheet = of_leaderboard(board)
    parts = [markdown_table(sheet), FRONT]
    if failed := failures(sheet):
        parts.append("\n".join(f"- failed: {each}" for each in failed))
    return "\n\n".join([*parts, *describe(board).splitlines()]) + "\n"


def write_json(board: Leaderboard, folder: Path) -> None:
    """`leaderboard.json`; a reader sees the old file or the new one, never half of one."""
    replace(folder / "leaderboard.json", board.model_dump_json(indent=2) + "\n")


def write_all(board: Leaderboard, folder: Path) -> list[Path]:
    """All files of a leaderboard; returns their paths."""
    # imported here: a leaderboard can be run and printed without matplotlib
    from .chart import draw

    write_json(board, folder)
    replace(folder / "leaderboard.csv", csv_text([_flat(row) for row in board.rows]))
    replace(folder / "leaderboard.md", markdown(board))
    draw(of_leaderboard(board), folder / "leaderboard.png", _title(board))
    return [folder / f"leaderboard.{kind}" for kind in ("json", "csv", "md", "png")]


def _title(board: Leaderboard) -> str:
    protocol = board.protocol
    dtypes = "/".join(dict.fromkeys(card.dtype for card in board.models))
    return (
        f"KV-cache quantization: accuracy against memory held\n{board.models[0].architecture if board.models else ''} "
        f"{dtypes}, {protocol.windows} windows of {protocol.length} tokens streamed through the packed cache, "
        f"newest {protocol.residual_length} exact"
    )


def _flat(row: Row) -> dict[str, Any]:
    line = row.model_dump(exclude={"memory", "accuracy", "calibration"})
    for name in ("memory", "accuracy", "calibration"):
        part = getattr(row, name)
        line |= {f"{name}_{field}": value for field, value in part.model_dump().items()} if part else {}
    return line
