"""Tables of measured figures, written from the leaderboard so that they cannot drift from it.

    python docs/figures.py

In README.md and docs/, between `<!-- figures -->` and `<!-- /figures -->`, a row says in its first cells what it is
about, a strategy in backquotes among them; the figures behind it are written from benchmarks/results/leaderboard.json,
as the table's head names them. A row of a strategy that was not measured gets `?`. After `<!-- figures: sorted -->`
rows are in the order of the leaderboard.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cachequant.benchmarks.report.run import Run
from cachequant.benchmarks.report.sheet import Line, grouped

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LEADERBOARD = ROOT / "benchmarks" / "results" / "leaderboard.json"
BLOCK = re.compile(r"(<!-- figures(: sorted)? -->\n+)(.*?)(\n+<!-- /figures -->)", re.DOTALL)
SPEC = re.compile(r"`([^`]+)`")

Lines = Mapping[str, Line]
Rows = Mapping[str, Lines]


def main() -> None:
    """Write all tables anew."""
    rows = measured()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (written := with_figures(text, rows)) != text:
            page.write_text(written, encoding="utf-8")
            print(page.relative_to(ROOT))


def measured() -> Rows:
    """The leaderboard's lines by strategy and model."""
    run = Run.model_validate_json(LEADERBOARD.read_text(encoding="utf-8"))
    return dict(grouped(run.sheets()[0]))


def with_figures(text: str, rows: Rows) -> str:
    """A page with the figures of `rows` in its tables."""
    return BLOCK.sub(lambda block: block[1] + _table(block[3], rows, bool(block[2])) + block[4], text)


def _table(table: str, rows: Rows, in_order: bool) -> str:
    head, rule, *body = [_cells(line) for line in table.splitlines()]
    named = sum(cell not in COLUMNS for cell in head)
    if in_order:
        places = {spec: place for place, spec in enumerate(rows)}
        body.sort(key=lambda cells: places.get(_spec(cells[:named]), len(places)))
    filled = [[*cells[:named], *_figures(_spec(cells[:named]), head[named:], rows)] for cells in body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *filled))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _spec(cells: list[str]) -> str:
    """The last thing in backquotes is what was measured."""
    return SPEC.findall(" ".join(cells))[-1]


def _figures(spec: str, head: list[str], rows: Rows) -> list[str]:
    lines = rows.get(spec)
    return ["?"] * len(head) if lines is None else [COLUMNS[column](lines) for column in head]


def _of_both(number: Callable[[float], str]) -> Callable[[Lines], str]:
    """A figure of the bits held: once where the models agree, else left and right."""
    return lambda lines: " / ".join(
        dict.fromkeys(number(line.memory.bits_per_element) for line in lines.values() if line.memory)
    )


def _divergence(panel: str) -> Callable[[Lines], str]:
    def cell(lines: Lines) -> str:
        found = lines[panel].metrics["kl_mean"]
        text = f"{found:.4f}" if found >= 1e-4 or not found else f"{found:.0e}"
        return f"**{text}**" if lines[panel].pareto else text

    return cell


def _agreement(panel: str) -> Callable[[Lines], str]:
    return lambda lines: f"{lines[panel].metrics['top1']:.1%}".replace("%", " %")


COLUMNS: dict[str, Callable[[Lines], str]] = {
    "bits held": _of_both("{:.2f}".format),
    "vs 16-bit": _of_both(lambda bits: f"{16 / bits:.1f}x"),
    "KL, reference": _divergence("reference"),
    "top-1, reference": _agreement("reference"),
    "KL, outlier twin": _divergence("outlier twin"),
    "top-1, outlier twin": _agreement("outlier twin"),
}


if __name__ == "__main__":
    main()
