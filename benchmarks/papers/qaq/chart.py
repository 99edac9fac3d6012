"""QAQ's curves: what divergence a number of bits buys, a column per model."""

from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from .curves import EXACT
from .results import DROPPING, EVICTIONS, OTHERS, QAQ, SIDES, Line, Result

# Okabe and Ito's colours, as in the leaderboard's picture; the recommended curve is black and thick everywhere.
STYLES = {
    QAQ: ("#000000", "o"),
    "no outliers": ("#D55E00", "s"),
    "window 1": ("#0072B2", "^"),
    "shared bits": ("#009E73", "D"),
    "no host copy": ("#CC79A7", "v"),
    DROPPING: ("#0072B2", "P"),
    "h2o": ("#D55E00", "s"),
    "scissorhands": ("#CC79A7", "D"),
    "uniform": ("#009E73", "^"),
}
LABELS = {QAQ: "QAQ", DROPPING: "QAQ, may drop", "uniform": "uniform", "h2o": "H2O", "scissorhands": "Scissorhands"}
PANELS = (
    ("what its parts are worth", tuple(name for name in SIDES if name != DROPPING)),
    ("against dropping tokens", (QAQ, DROPPING, *OTHERS)),
)
TICKS = (0.1, 0.2, 0.3, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 12, 16)


def figure(result: Result) -> Figure:
    """Mean KL against packed bits, both logarithmic: ablations above, other methods below."""
    cards = result.board.models
    drawing = Figure(figsize=(8.4 * len(cards), 12), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(drawing)
    grid = drawing.subplots(len(PANELS), len(cards), squeeze=False, sharex="row", sharey="row")
    placed = []
    for axes, (title, names) in zip(grid, PANELS, strict=True):
        for ax, card in zip(axes, cards, strict=True):
            lines = [line for line in result.lines if line.row.panel == card.panel]
            curves = {name: points for name in names if (points := _points(lines, name))}
            _draw_panel(ax, curves)
            ax.set_title(f"{card.panel}: {title}", fontsize=13)
            placed.append((ax, curves))
        _set_limits(axes[0], [curves for ax, curves in placed if ax in axes])
        axes[0].set_ylabel("mean KL divergence to the unquantized model, nats per token", fontsize=11)
    protocol = result.board.protocol
    drawing.suptitle(
        f"QAQ: accuracy against packed bits, {protocol.windows} windows of {protocol.length} tokens streamed\n"
        "lower left is better; points of a curve are targets, shares kept (evictions) or widths (uniform)",
        fontsize=13,
    )
    # the labels need the final positions; and they must not move them afterwards
    canvas.draw()
    drawing.set_layout_engine("none")
    for ax, curves in placed:
        _place_labels(ax, curves, canvas.get_renderer())
    return drawing


def _points(lines: list[Line], name: str) -> list[tuple[float, float]]:
    """Bits and divergence, all that were measured."""
    rows = [(line.row.memory, line.row.accuracy) for line in lines if line.curve == name]
    return sorted(
        (memory.packed_bits_per_element, accuracy.kl_mean)
        for memory, accuracy in rows
        if memory and accuracy and accuracy.kl_mean >= EXACT and memory.packed_bits_per_element > 0
    )


def _draw_panel(ax: Any, curves: dict[str, list[tuple[float, float]]]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda kl, _: f"{kl:g}"))
    ax.grid(True, which="major", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("bits per packed number, metadata included", fontsize=11)
    ax.tick_params(labelsize=10, labelleft=True, labelbottom=True)
    for name, points in curves.items():
        color, marker = STYLES[name]
        first = name == QAQ
        style = {"linewidth": 2.2 if first else 1.4, "markersize": 6.5 if first else 5.5, "zorder": 4 if first else 3}
        dashes = "--" if name in EVICTIONS else "-"
        ax.plot(*zip(*points, strict=True), marker=marker, color=color, linestyle=dashes, **style)


def _set_limits(ax: Any, panels: list[dict[str, list[tuple[float, float]]]]) -> None:
    """All of QAQ, and of the others what is not far more accurate."""
    points = [point for curves in panels for spots in curves.values() for point in spots]
    ours = [point for curves in panels for name in curves if name in SIDES for point in curves[name]]
    if ours:
        ax.set_xlim(min(bits for bits, _ in points) / 1.3, max(bits for bits, _ in points) * 1.15)
        ax.set_ylim(min(kl for _, kl in ours) / 2.5, max(kl for _, kl in points) * 2)


def _place_labels(ax: Any, curves: dict[str, list[tuple[float, float]]], renderer: Any) -> None:
    """One label per curve, beside the point where it covers least."""
    frame = ax.get_window_extent(renderer)
    gap = 9 * ax.figure.dpi / 72
    ink = {name: _along(ax.transData.transform(points)) for name, points in curves.items()}
    labels: list[Bbox] = []
    for name in curves:
        text = ax.annotate(
            LABELS.get(name, name),
            (0, 0),
            xycoords="figure pixels",
            color=STYLES[name][0],
            fontsize=11,
            fontweight="bold" if name == QAQ else "normal",
            zorder=5,
        )
        size = text.get_window_extent(renderer)
        others = np.concatenate([np.empty((0, 2)), *(spots for other, spots in ink.items() if other != name)])
        options = [
            (_cost(box, spot, ink[name], others, labels, frame), box)
            for spot in ink[name]
            for box in _around(spot, size.width, size.height, gap)
        ]
        _, box = min(options, key=lambda option: option[0])
        text.xy = (box.x0, box.y0)
        text.set_position((box.x0, box.y0))
        labels.append(box)


def _along(spots: np.ndarray) -> np.ndarray:
    """The curve in steps of at most eight pixels, `[n, 2]`."""
    parts = [spots[:1]]
    for start, end in pairwise(spots):
        steps = max(1, ceil(np.hypot(*(end - start)) / 8))
        parts.append(start + (end - start) * np.arange(1, steps + 1)[:, None] / steps)
    return np.concatenate(parts)


def _around(spot: np.ndarray, width: float, height: float, gap: float) -> list[Bbox]:
    x, y = spot
    corners = [
        (x + gap, y - height / 2),
        (x - gap - width, y - height / 2),
        (x - width / 2, y + gap),
        (x - width / 2, y - gap - height),
        (x + gap / 2, y + gap / 2),
        (x - width - gap / 2, y - height - gap / 2),
        (x + gap / 2, y - height - gap / 2),
        (x - width - gap / 2, y + gap / 2),
    ]
    return [Bbox.from_bounds(left, bottom, width, height) for left, bottom in corners]


def _cost(box: Bbox, spot: np.ndarray, own: np.ndarray, others: np.ndarray, labels: list[Bbox], frame: Bbox) -> float:
    """What the label would cover; then how near other curves are, to which it might seem to belong."""
    covered = sum(
        int(((np.subtract(box.min, 4) < spots) & (spots < np.add(box.max, 4))).all(1).sum()) for spots in (own, others)
    )
    clash = sum(box.padded(4).overlaps(label) for label in labels)
    outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
    beyond = np.maximum(np.maximum(box.min - others, others - box.max), 0)
    away = min(np.hypot(*each.T).min(initial=1e4) for each in (beyond, others - spot))
    return 100 * covered + 1000 * clash + 1000 * outside + 400 / (1 + away / 10)
