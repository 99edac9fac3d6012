"""A picture of how bits move while decoding: the width of every token of one layer, after every decision.

    python -m cachequant.benchmarks.bits_over_time --out bits-over-time.png

A text is streamed through the cache in passes as long as the interval between decisions; a decision after a pass sees
what it would see had the tokens been decoded one by one.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from .. import registry
from ..core import AdaptiveStrategy, PackedCache, Side
from ..core.hf.adaptive import AdaptiveLayer
from ..core.hf.layer import SIDES
from .errors import Unusable, message
from .subjects import REFERENCE, context_of, load_model, read_text

STRATEGY = "qaq:sigma_value=0.05,interval=16"

# first tokens drawn wide enough to be seen
BEGINNING = 6

# bits to colours: pale to dark, but what is lost in another hue; 1 stands for tokens still exact
TAIL = 1
COLORS = {
    0: ("#E69F00", "dropped"),
    TAIL: ("#E8E8E8", "exact, not packed yet"),
    2: ("#DCEAF6", "2 bits"),
    3: ("#8DC1E3", "3"),
    4: ("#2E86C1", "4"),
    8: ("#123C73", "8"),
    16: ("#D55E00", "16"),
}


class Trace(NamedTuple):
    """Widths after every decision."""

    seen: list[int]
    """Tokens read so far, by decision."""
    widths: dict[Side, list[Tensor]]
    """uint8 `[packed tokens]`, by decision."""


class Labels(NamedTuple):
    """What the picture says about itself."""

    title: str
    subtitle: str
    beginning: str


@torch.inference_mode()
def record(
    model: Any, strategy: AdaptiveStrategy, ids: Tensor, layer: int, prefill: int, residual_length: int
) -> Trace:
    """Stream `ids [1, tokens]`, and note the widths of the first head of a layer whenever they were decided.

    Raises ValueError where the model has no such layer, or it is not packed.
    """
    cache = PackedCache(model, strategy, residual_length=residual_length)
    if not 0 <= layer < len(cache.layers):
        raise ValueError(f"the model has layers 0 to {len(cache.layers) - 1}, not {layer}")
    watched = cache.layers[layer]
    if not isinstance(watched, AdaptiveLayer):
        raise ValueError(f"layer {layer} is not full attention; choose one that is")
    trace = Trace([], {side: [] for side in SIDES})
    starts = [0, *range(prefill, ids.shape[1], strategy.interval), ids.shape[1]]
    for start, stop in pairwise(starts):
        model(ids[:, start:stop].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        packed = watched.packed_tokens
        if packed > (len(trace.widths["key"][-1]) if trace.seen else 0):
            trace.seen.append(stop)
            for side in SIDES:
                trace.widths[side].append(watched.pools[side].widths[0].cpu().clone())
    if not trace.seen:
        raise ValueError(f"nothing was packed in {ids.shape[1]} tokens; read more, or set a shorter interval")
    return trace


def moved(trace: Trace, side: Side) -> float:
    """Share of the packed tokens whose width a decision changed, mean over decisions."""
    rows = trace.widths[side]
    changed = [(after[: len(before)] != before).float().mean().item() for before, after in pairwise(rows)]
    return sum(changed) / len(changed) if changed else 0.0


def draw(trace: Trace, labels: Labels, path: Path) -> None:
    """Write a PNG: values above, keys below; beside them the first tokens, and the mean of each row."""
    figure = Figure(figsize=(12, 8.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharey=True, width_ratios=(0.55, 8, 1.25))
    colors = ListedColormap([color for color, _ in COLORS.values()])
    numbers = list(COLORS)
    norm = BoundaryNorm([-0.5, *(number + 0.5 for number in numbers)], len(numbers))
    means = {side: [rows.float().mean().item() for rows in trace.widths[side]] for side in SIDES}
    lowest, highest = min(map(min, means.values())) - 0.6, max(map(max, means.values())) + 0.6
    for (first, every, mean), side in zip(axes, ("value", "key"), strict=True):
        picture = _picture(trace, side)
        edges = _edges(trace.seen)
        for ax, shown in ((first, picture[:, :BEGINNING]), (every, picture)):
            positions = np.arange(shown.shape[1] + 1) - 0.5
            ax.pcolormesh(positions, edges, shown, cmap=colors, norm=norm, rasterized=True)
            ax.tick_params(labelsize=10)
            ax.spines[["top", "right"]].set_visible(False)
        first.set_xticks([0, BEGINNING - 1])
        first.set_ylabel(f"{side}s\ntokens read", fontsize=12)
        every.set_title(
            f"{side}s: {means[side][-1]:.2f} bits on average at the end, {moved(trace, side):.0%} of the tokens "
            "change width in each decision",
            fontsize=11,
            loc="left",
        )
        mean.plot(means[side], trace.seen, color="0.25", linewidth=1.4)
        mean.set_xticks([width for width in COLORS if lowest < width < highest and width != TAIL])
        mean.set_xlim(lowest, highest)
        mean.grid(True, axis="x", color="0.9", linewidth=0.8)
        mean.spines[["top", "right"]].set_visible(False)
        mean.tick_params(labelsize=10)
    axes[0, 0].invert_yaxis()
    axes[1, 0].set_xlabel(labels.beginning, fontsize=11)
    axes[1, 1].set_xlabel("position of the token", fontsize=11)
    axes[1, 2].set_xlabel("mean bits", fontsize=11)
    held = {int(width) for rows in trace.widths.values() for row in rows for width in row.unique()}
    handles = [
        Patch(facecolor=color, edgecolor="0.6", linewidth=0.5, label=label)
        for number, (color, label) in COLORS.items()
        if number in held | {TAIL}
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)
    figure.suptitle(f"{labels.title}\n{labels.subtitle}", fontsize=13)
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("bits-over-time.png"),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    strategy: Annotated[str, typer.Option(help="Spec of a strategy with widths per token.")] = STRATEGY,
    layer: Annotated[int, typer.Option(min=0, help="Which layer to watch.")] = 3,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens read.")] = 800,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the first pass.")] = 64,
    residual_length: Annotated[int, typer.Option(min=0, help="Newest tokens kept exact.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Draw how the bits of the tokens of one layer change while a text is read."""
    if threads:
        torch.set_num_threads(threads)
    try:
        parsed = registry.parse(strategy)
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(message(error), param_hint="--strategy") from error
    if not isinstance(parsed, AdaptiveStrategy):
        raise typer.BadParameter(f"{strategy!r} gives all tokens the same bits; try qaq", param_hint="--strategy")
    try:
        panel, loaded, tokenizer = load_model(model, torch.float32, "cpu")
        name, content = read_text(text, "heldout", "--text")
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*start, *tokenizer(content, add_special_tokens=False, verbose=False).input_ids]
    most = min(len(ids), context_of(loaded))
    if not prefill < length <= most:
        raise typer.BadParameter(
            f"{length} tokens: use more than the prefill's {prefill}, and at most {most}, which text and model give",
            param_hint="--length",
        )
    try:
        trace = record(loaded, parsed, torch.tensor([ids[:length]]), layer, prefill, residual_length)
    except ValueError as error:
        raise typer.BadParameter(message(error)) from error
    what = "reference model" if panel == REFERENCE else panel
    labels = Labels(
        f"Bits of every token while decoding: {registry.spec(parsed)}",
        f"{what}, layer {layer}, {name}, newest {residual_length} tokens exact",
        "first\ntokens" + ("\n(0: BOS)" if start else ""),
    )
    try:
        draw(trace, labels, out)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error
    for side in SIDES:
        mean = trace.widths[side][-1].float().mean().item()
        Console().print(
            f"{side}s: {mean:.2f} bits on average at the end; {moved(trace, side):.1%} of them change width in each of "
            f"{len(trace.seen)} decisions",
            highlight=False,
        )


def _picture(trace: Trace, side: Side) -> NDArray[np.float64]:
    """Widths by decision and position, TAIL where a token is exact, NaN where it was not read yet."""
    picture = np.full((len(trace.seen), trace.seen[-1]), np.nan)
    for row, seen, widths in zip(picture, trace.seen, trace.widths[side], strict=True):
        row[:seen] = TAIL
        row[: len(widths)] = widths.numpy()
    return picture


def _edges(seen: list[int]) -> list[float]:
    """Where rows begin and end, each ending at the tokens read by then."""
    first = seen[1] - seen[0] if len(seen) > 1 else seen[0]
    return [seen[0] - first, *seen]


if __name__ == "__main__":
    typer.run(main)
