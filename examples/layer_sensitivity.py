"""Which layers lose most at two bits, and is it their keys or their values?

    python examples/layer_sensitivity.py --out sensitivity.png
    python examples/layer_sensitivity.py --model PATH --text notes.txt --strategy uniform:bits=3

One side of one layer is packed at a time, the rest of the cache stays exact. `cachequant tune` begins like this, and
goes on to the best use of a number of bits.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from cachequant.benchmarks.streaming import SMALLEST_BLOCK
from cachequant.benchmarks.tune.allocate import measure_alone
from cachequant.benchmarks.tune.bench import Bench, gather
from cachequant.benchmarks.tune.journal import Journal
from cachequant.benchmarks.tune.menu import SIDES, Place, compose

COLORS = {"key": "#0072B2", "value": "#D55E00"}


def main() -> None:
    given = arguments()
    (material,), _ = gather(given.model, calibration_text=given.text, windows=given.windows)
    with TemporaryDirectory() as folder, Journal(Path(folder, "measured"), material.about).opened() as journal:
        bench = Bench(material.verifying, material.tuning, material.task, SMALLEST_BLOCK, journal)
        menu, _ = compose(bench, [given.strategy])
        if len(menu.rungs) > 1:
            raise SystemExit(f"{given.strategy} has several widths; name one, such as {menu.rungs[0].spec}")
        losses = {place: sum(loss.values(), 0.0) for place, loss in measure_alone(bench, menu, told).items()}

    for (layer, side), loss in sorted(losses.items(), key=lambda each: -each[1]):
        print(f"layer {layer:>2}, {side + 's':<6}  KL {loss:.2g}")
    draw(losses, f"{given.strategy} alone, {bench.panel.card.panel}\n{bench.text('tuning').name}", given.out)
    print(f"wrote {given.out}")


def told(what: str, done: int, total: int) -> None:
    print(f"{done + 1}/{total} {what:<30}", end="\r", file=sys.stderr)


def draw(losses: dict[Place, float], title: str, out: Path) -> None:
    """Two bars for each layer."""
    layers = sorted({place.layer for place in losses})
    figure = Figure(figsize=(max(5.0, 1.5 + 0.6 * len(layers)), 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for shift, side in zip((-0.2, 0.2), SIDES, strict=True):
        heights = [losses[Place(layer, side)] for layer in layers]
        ax.bar([layer + shift for layer in layers], heights, 0.4, color=COLORS[side], label=f"{side}s")
    ax.set_xticks(layers)
    ax.set_xlabel("layer")
    ax.set_ylabel("KL to the exact model, nats per token")
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="uniform:bits=2", help="spec (default: uniform:bits=2)")
    parser.add_argument("--model", help="folder or hub name (default: the bundled reference)")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: Python's standard library)")
    parser.add_argument("--windows", type=int, default=2, help="stretches of the text (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("layer-sensitivity.png"), help="picture to write")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (LookupError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
