"""The picture: how much faster than the best 16-bit cache, and how near to what memory gives."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..report.chart import COLORS, MARKERS
from .report import DRY, distinct, title
from .results import AttentionTiming, Results

# (kv heads, query heads of each) of the panels, batch 1
PANELS = ((8, 4), (32, 1))


def draw(results: Results, path: Path) -> None:
    """Write a PNG: ratios above, bandwidth below, against the context; a panel per kind of attention."""
    figure = Figure(figsize=(13, 9.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title(results)}\n{results.hardware.environment}", fontsize=10)
    timed = [each for each in results.attention if each.us is not None]
    if not timed:
        text = DRY if results.dry else "no attention was timed"
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=24, color="0.4")
        figure.savefig(path)
        return
    packed = distinct(each.contender for each in timed if not each.sixteen_bit)
    style = {
        name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], "-" if i < len(COLORS) else "--")
        for i, name in enumerate(packed)
    }
    axes = figure.subplots(2, len(PANELS), sharex=True, sharey="row", squeeze=False)
    for column, (kv_heads, group) in zip(range(len(PANELS)), PANELS, strict=True):
        rows = [each for each in timed if (each.batch, each.kv_heads, each.group) == (1, kv_heads, group)]
        top, bottom = axes[0][column], axes[1][column]
        _lines(top, rows, style, "ratio")
        _lines(bottom, _with_best(rows), {**style, "best 16-bit": ("0.3", "x", ":")}, "tb_s")
        top.axhline(1, color="0.3", linewidth=1)
        top.set_title(f"{kv_heads} kv heads x {group} query heads, batch 1", fontsize=11)
        bottom.set_xlabel("tokens of context")
        if results.ceilings is not None and results.ceilings.read_tb_s is not None:
            bottom.axhline(results.ceilings.read_tb_s, color="0.3", linewidth=1, linestyle="--")
        for ax in (top, bottom):
            _set_ticks(ax, distinct(each.tokens for each in timed))
    for row in axes:
        row[0].set_ylim(bottom=0)  # last: it ends autoscaling, and is shared by the row
    axes[0][0].set_ylabel("times as fast as the best 16-bit attention")
    axes[1][0].set_ylabel("TB/s of the cache read (dashed: read ceiling)")
    handles, labels = [], []
    for ax in axes[1]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))), frameon=False)
    figure.savefig(path)


def _with_best(rows: list[AttentionTiming]) -> list[AttentionTiming]:
    """The packed contenders, and the best of the others under one name."""
    best: dict[int, AttentionTiming] = {}
    for each in rows:
        if each.sixteen_bit and (each.tokens not in best or (each.tb_s or 0) > (best[each.tokens].tb_s or 0)):
            best[each.tokens] = each
    named = [each.model_copy(update={"contender": "best 16-bit"}) for each in best.values()]
    return [each for each in rows if not each.sixteen_bit] + named


def _lines(ax: Any, rows: list[AttentionTiming], style: dict[str, tuple[str, str, str]], figure: str) -> None:
    for name, (color, marker, line) in style.items():
        points = sorted(
            (each.tokens, getattr(each, figure))
            for each in rows
            if each.contender == name and getattr(each, figure) is not None
        )
        if points:
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=name)


def _set_ticks(ax: Any, tokens: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(tokens)))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda count, _: f"{count / 1024:g}K" if count < 1 << 20 else f"{count / 2**20:g}M")
    )
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
