"""The leaderboard's picture: what accuracy a given number of bits buys, one panel per model."""

from itertools import pairwise
from math import dist
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from ... import registry
from ...registry import specs
from ..contenders import BASELINES
from ..tasks.base import Metric
from .sheet import Line, Sheet
from .tables import figure as written

# Below this a divergence is float rounding: the cache is exact, and a logarithmic axis has no place for it.
EXACT = 1e-6

# Okabe and Ito's colours without yellow and black, told apart by most colour-blind readers; markers say it again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32)
BASELINE_COLOR = "#555555"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# More points than this and their labels would cover them: then only those that one looks for are labelled.
CROWDED = 40
LABEL_WIDTH = 28
TITLE_WIDTH = 94


class Point(NamedTuple):
    """A row on the chart."""

    x: float
    y: float
    label: str
    family: str
    pareto: bool
    labelled: bool = True


def draw(sheet: Sheet, path: Path, title: str) -> None:
    """Write a PNG: the headline metric against bits per element, Pareto front drawn, points labelled.

    Of more than 40 points those on the front, strategies at their defaults and baselines are.
    """
    metric = sheet.headline
    panels = [(panel, _points(sheet, panel)) for panel in sheet.panels]
    families = sorted({point.family for _, points in panels for point in points})
    ours = [name for name in families if name not in BASELINES]
    style = {
        name: (COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]) for i, name in enumerate(ours)
    }
    # what readers have today, drawn apart
    style |= {name: (BASELINE_COLOR, "*") for name in families if name in BASELINES}
    figure = Figure(figsize=(8.4 * max(1, len(panels)), 8.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, sharex=True, squeeze=False)[0]
    for ax, (panel, points) in zip(axes, panels, strict=False):
        _draw_panel(ax, points, style, metric)
        ax.set_title(f"{panel}\n{_yardstick(sheet, panel)}", fontsize=12)
    axes[0].set_ylabel(_axis(metric), fontsize=11)
    _set_limits(axes[0], [point for _, points in panels for point in points], metric)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=name) for name, (color, marker) in style.items()
    ]
    handles.append(Line2D([], [], color="0.35", linewidth=1.2, label="Pareto front (filled)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=13)
    # the labels need the final positions; and they must not move them afterwards
    canvas.draw()
    figure.set_layout_engine("none")
    for ax, (_, points) in zip(axes, panels, strict=False):
        _place_labels(ax, points, style, canvas.get_renderer())
    figure.savefig(path)


def short_label(spec: str) -> str:
    """The settings of a spec as words: `uniform:bits=2,key_rope=pre` gives `2-bit pre`; the colour says `uniform`."""
    name, settings = specs.split(spec)
    words = [] if "bits" in settings or "base" in settings else _default_bits(name)
    for field, value in settings.items():
        if field.endswith("bits") and value.isdigit():
            side = "" if field == "nbits" else field[:-4].strip("_")
            words.append(f"{side} {value}-bit".strip())
        elif value == "true":
            words.append(field.replace("_", " "))
        elif value.replace(".", "", 1).isdigit() or value in ("false", "none"):
            words.append(f"{field.replace('_', ' ')} {value}")
        else:
            words.append(str(specs.read(value, False)))
    return " ".join(words) or name


def _default_bits(name: str) -> list[str]:
    """A spec leaves out what is at its default, but a label without its bits would puzzle."""
    try:
        fields = registry.describe(name).fields
    except LookupError:
        return []
    return [f"{field.default}-bit" for field in fields if field.name == "bits" and isinstance(field.default, int)]


def _points(sheet: Sheet, panel: str) -> list[Point]:
    metric = sheet.headline
    points = [
        Point(
            line.memory.bits_per_element,
            line.metrics[metric.name],
            short_label(line.strategy),
            line.family,
            line.pareto,
            line.pareto or line.baseline or line.strategy == line.family,
        )
        for line in sheet.lines
        if line.panel == panel and line.memory and not _exact(line, metric)
    ]
    if len(points) <= CROWDED:
        return [point._replace(labelled=True) for point in points]
    return [point._replace(label=_with_family(point)) for point in points]


def _with_family(point: Point) -> str:
    """Where most points have no label, one is not to be guessed from its neighbours' colours."""
    known = point.family in BASELINES or point.label == point.family
    return fill(point.label if known else f"{point.family} {point.label}", LABEL_WIDTH)


def _logarithmic(metric: Metric) -> bool:
    """Losses span decades; shares do not."""
    return metric.better == "lower" and not metric.percent


def _exact(line: Line, metric: Metric) -> bool:
    value = line.metrics.get(metric.name)
    return value is None or (_logarithmic(metric) and value < EXACT)


def _yardstick(sheet: Sheet, panel: str) -> str:
    """What the exact rows, which a logarithmic axis cannot show, came to."""
    exact = [
        f"{line.strategy} {line.memory.bits_per_element:.1f} bits"
        + (f", {sheet.metrics[-1].label} {written(sheet.metrics[-1], line.metrics.get(sheet.metrics[-1].name))}")
        for line in sheet.lines
        if line.panel == panel and line.memory and line.metrics and _exact(line, sheet.headline)
    ]
    return fill(f"exact, not shown: {'; '.join(exact)}", TITLE_WIDTH) if exact else ""


def _axis(metric: Metric) -> str:
    if metric.name == "kl_mean":
        return "mean KL divergence to the unquantized model, nats per token"
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label


def _draw_panel(ax: Any, points: list[Point], style: dict[str, tuple[str, str]], metric: Metric) -> None:
    ax.set_xscale("log")
    if _logarithmic(metric):
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(True, which="major", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("bits per cached number, everything held included", fontsize=11)
    ax.tick_params(labelsize=10, labelleft=True)
    front = sorted((point.x, point.y) for point in points if point.pareto)
    if front:
        ax.step(*zip(*front, strict=True), where="post", color="0.35", linewidth=1.2, zorder=1)
    for point in points:
        color, marker = style[point.family]
        face = color if point.pareto else "white"
        ax.plot(point.x, point.y, marker, color=color, markerfacecolor=face, markersize=7, zorder=3)


def _set_limits(ax: Any, points: list[Point], metric: Metric) -> None:
    if points:
        xs, ys = [point.x for point in points], [point.y for point in points]
        ax.set_xlim(min(xs) / 1.15, max(xs) * 1.15)
        if _logarithmic(metric):
            ax.set_ylim(min(ys) / 2.5, max(ys) * 2.5)
        else:
            margin = 0.1 * (max(ys) - min(ys)) or 0.1
            ax.set_ylim(min(ys) - margin, max(ys) + margin)


def _place_labels(ax: Any, points: list[Point], style: dict[str, tuple[str, str]], renderer: Any) -> None:
    """Put every label where it covers least: next to its point, or further off with a line to it."""
    if not points:
        return
    places = ax.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    taken += _front_boxes(sorted((x, y) for (x, y), point in zip(places, points, strict=True) if point.pareto))
    labels: list[Bbox] = []
    frame = ax.get_window_extent(renderer)
    pixels = ax.figure.dpi / 72
    # crowded points first, while there is room around them
    crowd = [sum(abs(x - u) + 3 * abs(y - v) < 160 for u, v in places) for x, y in places]
    for i in sorted((i for i, point in enumerate(points) if point.labelled), key=lambda i: -crowd[i]):
        point = points[i]
        color = style[point.family][0]
        weight = "bold" if point.pareto else "normal"
        text = ax.annotate(
            point.label,
            (point.x, point.y),
            textcoords="offset points",
            xytext=(0, 0),
            color=color,
            fontsize=9,
            fontweight=weight,
            zorder=4,
        )
        size = text.get_window_extent(renderer)
        options = [
            (offset, _moved(places[i], offset, size, pixels))
            for offset in _offsets(size.width / pixels, size.height / pixels)
        ]
        offset, box = min(options, key=lambda option: _cost(places[i], option[1], taken, labels, frame, pixels))
        text.set_position(offset)
        labels.append(box)
        end = _nearest(places[i], box)
        if dist(places[i], end) > 12 * pixels:
            taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in _line(places[i], end)]
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            ends = {"xy": (point.x, point.y), "xytext": end, "textcoords": "figure pixels"}
            ax.annotate("", **ends, arrowprops=arrow, zorder=2)


def _front_boxes(front: list[tuple[float, float]]) -> list[Bbox]:
    """The staircase of the Pareto front as thin boxes that labels avoid."""
    boxes = []
    for (x, y), (u, v) in pairwise(front):
        boxes += [Bbox.from_extents(x, y - 3, u, y + 3), Bbox.from_extents(u - 3, v, u + 3, y)]
    return boxes


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners of a label around a point, in points."""
    spots = []
    for distance in (6, 16, 28, 42, 58, 76, 100):
        for x in (distance, -distance - width, -width / 2, 0, -width):
            for y in (-height / 2, distance, -distance - height, 5, -height - 5):
                spots.append((x, y))
    return spots


def _moved(place: Any, offset: tuple[float, float], size: Bbox, pixels: float) -> Bbox:
    return Bbox.from_bounds(
        place[0] + offset[0] * pixels - 2, place[1] + offset[1] * pixels - 1, size.width + 4, size.height + 2
    )


def _nearest(place: Any, box: Bbox) -> tuple[float, float]:
    """The spot of the label where a line from its point ends."""
    return min(max(place[0], box.x0), box.x1), min(max(place[1], box.y0), box.y1)


def _line(start: Any, end: tuple[float, float]) -> list[tuple[float, float]]:
    """Spots along a line, four pixels apart, without those on the point itself."""
    steps = max(1, round(dist(start, end) / 4))
    parts = [step / steps for step in range(1, steps + 1) if 4 * step > 8]
    return [(start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])) for part in parts]


def _cost(place: Any, box: Bbox, taken: list[Bbox], labels: list[Bbox], frame: Bbox, pixels: float) -> float:
    """What a label at `box` would cover, in pixels squared; then its distance."""
    end = _nearest(place, box)
    reach = dist(place, end) / pixels
    if reach < 4:
        return 1e6
    # two labels over each other are unreadable, one over a line is not
    covered = sum(_overlap(box, other) for other in taken) + 20 * sum(_overlap(box, label) for label in labels)
    outside = box.width * box.height - _overlap(box, frame)
    line = _line(place, end) if reach > 12 else []
    crossed = sum(any(label.contains(*spot) for spot in line) for label in labels)
    return covered + 20 * outside + 400 * crossed + 4 * reach


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
