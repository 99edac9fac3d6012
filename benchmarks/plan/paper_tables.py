"""A paper's sizes beside ours, for the terminal."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from .paper import LENGTHS, MODELS, Comparison, column_name

LENGTH_NAMES = {2**17: "128K", 2**20: "1M", 10 * 2**20: "10M"}
EXPLAINED = ("LLaMA-7B", 2**17)
"""Model and length whose differences are taken apart."""


def render(compared: Comparison) -> Iterator[Table | str]:
    """Sizes, what differences are made of, and why."""
    yield f"{compared.title}, {compared.source}: GiB of one sequence's cache, ours / the paper's accounting"
    yield _sizes(compared)
    printed = [cell for cell in compared.cells if cell.printed is not None]
    secondary = sum(cell.evidence == "secondary" for cell in printed)
    yield (
        f"The paper prints {len(printed)} of these figures, marked * ({secondary} known from secondary sources); the "
        "others are its accounting, which gives the printed ones to their last digit. Ours: held after a prompt of "
        "that length. 128K is 131,072 tokens, 1M 2**20, 10M 10 * 2**20."
    )
    model, tokens = EXPLAINED
    yield f"What the differences are made of: bits per cached number, ours less the paper's, {model}, {tokens:,} tokens"
    yield _differences(compared)
    named = {kind for cell in compared.cells for kind in cell.difference}
    yield from (f"{kind}: {reason}." for kind, reason in compared.reasons.items() if kind in named)
    yield f"Strategies: {', '.join(f'{name} = {spec}' for name, spec in compared.specs.items())}."
    yield from (f"note: {note}." for note in compared.notes)


def _sizes(compared: Comparison) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("model")
    found.add_column("tokens", justify="right")
    for name in compared.specs:
        found.add_column(name, justify="right", no_wrap=True)
    for model in MODELS:
        for tokens in LENGTHS:
            cells = [cell for cell in compared.cells if (cell.model, cell.tokens) == (model, tokens)]
            texts = [f"{_gib(cell.ours)} / {_gib(cell.paper)}{'*' * (cell.printed is not None)}" for cell in cells]
            found.add_row(model, LENGTH_NAMES[tokens], *texts)
    return found


def _differences(compared: Comparison) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("")
    cells = [cell for cell in compared.cells if (cell.model, cell.tokens) == EXPLAINED and cell.bits != 16]
    for cell in cells:
        found.add_column(column_name(cell.bits, cell.outliers), justify="right")
    for kind in compared.reasons:
        found.add_row(kind, *(f"{cell.difference.get(kind, 0.0):+.4f}" for cell in cells))
    found.add_row("in all", *(f"{sum(cell.difference.values()):+.4f}" for cell in cells))
    found.add_row("ours / paper's", *(f"{cell.ratio:.3f}" for cell in cells))
    return found


def _gib(number: float) -> str:
    return f"{number:.1f}" if number < 1000 else f"{number:,.0f}"
