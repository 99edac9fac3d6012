"""Which strategy loses least on your own text?

    python examples/compare_on_your_text.py --text notes.txt --model PATH
    python examples/compare_on_your_text.py --strategies uniform kvquant:bits=2 "QuantizedCache:backend=quanto,nbits=4"

The text is read through every cache, as a chat would fill it, beside a run that keeps everything exact. `cachequant
bench` is the same with more to see, and keeps what it measured.
"""

import argparse
from pathlib import Path

from cachequant.benchmarks import leaderboard
from cachequant.benchmarks.contenders import candidates

STRATEGIES = ("int8", "uniform", "rotated", "kivi:bits=4", "kivi", "DynamicCache")


def main() -> None:
    given = arguments()
    strategies = candidates(given.strategies)
    board, subjects = leaderboard.prepare(given.model, given.text, windows=given.windows, twin=False)
    rows = list(leaderboard.run(subjects, strategies))

    tokens = board.protocol.scored
    print(f"{board.models[0].panel}, {tokens:,} tokens of {board.text.name}\n")
    print(f"{'strategy':<42} {'bits held':>9} {'KL':>9} {'top-1':>7}")
    for row in sorted(rows, key=lambda row: row.accuracy.kl_mean if row.accuracy else float("inf")):
        if row.accuracy and row.memory:
            bits, accuracy = row.memory.bits_per_element, row.accuracy
            print(f"{row.strategy:<42} {bits:>9.2f} {accuracy.kl_mean:>9.2g} {accuracy.top1:>7.1%}")
        else:
            print(f"{row.strategy:<42} failed: {row.error}")
    print("\nKL: divergence from the exact model, nats per token. top-1: how often its likeliest token stays the same.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: Python's standard library)")
    parser.add_argument("--model", help="folder or hub name (default: the bundled reference)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="specs, and caches of transformers")
    parser.add_argument("--windows", type=int, default=2, help="stretches of the text (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (LookupError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
