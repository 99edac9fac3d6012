"""Plans for the terminal."""

from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table

from .planning import Figures, Plan, Row
from .sizes import size

HOST = "host copies"


def header(plan: Plan) -> Iterator[str]:
    """What the figures are about, a line each."""
    setting, budget = plan.setting, plan.budget
    yield (
        f"{plan.model}: {plan.architecture}, {_count(plan.parameters)} parameters, {plan.layers} layers, "
        f"{plan.dtype}, batch {setting.batch}"
    )
    devices = f"{setting.devices} device{'s' * (setting.devices > 1)} of {size(budget.memory)}"
    if setting.devices > 1:
        devices += f" ({setting.tensor_parallel} to a layer, {setting.stages} after another)"
    yield (
        f"{devices}, or {budget.memory / 1e9:.2f} GB, each; {size(budget.reserve)} of it left free; "
        f"weights {size(budget.weights)} in all"
    )


def contexts(plan: Plan) -> Table:
    """What fits: a row per strategy."""
    asked = plan.context is not None
    found = _table("longest", *(["fits"] if asked else []), "cache", "bits", "vs 16-bit")
    for row in plan.rows:
        found.add_row(escape(_name(row)), *_fitting(row, asked), style="dim" if row.error else "")
    return found


def parts(plan: Plan) -> Table:
    """What a token of a long text takes, and what takes the memory: a row per strategy."""
    found = _table("B/token", "B/layer", "bits")
    found.add_column("what takes the memory", overflow="fold", min_width=20)
    for row in plan.rows:
        rates = [(row.bytes_per_token, ",.0f"), (row.mean_layer_bytes, ",.0f"), (row.limit_bits, ".2f")]
        figures = ["" if rate is None else format(rate, form) for rate, form in rates]
        taken = "" if row.at is None else shares(row.at)
        found.add_row(escape(_name(row)), *figures, taken, style="dim" if row.error else "")
    return found


def footer(plan: Plan) -> Iterator[str]:
    """How to read the table, and what to know."""
    where = f"{plan.context:,} tokens" if plan.context is not None else "the longest context"
    yield (
        f"longest: tokens per sequence that fit whatever happens. At {where}: cache at most; bits per cached number "
        "usually (at most); what takes the memory at most, weights included. At most: buffers have just grown, tails "
        "are full. In long texts: bytes of one more token of one sequence, in all layers (B/token) and in each that "
        "grows (B/layer); bits per number (second table)."
    )
    host = max((row.at.host for row in plan.rows if row.at is not None), default=0)
    if host:
        yield f"Copies in host memory are no part of these figures: up to {size(host)}."
    for note in plan.notes:
        yield f"note: {note}."
    for row in plan.rows:
        for note in row.notes:
            yield f"note: {row.strategy}: {note}."
        if row.error:
            yield f"no figures: {row.strategy}: {row.error}"


def shares(figures: Figures, most: int = 3) -> str:
    """The largest parts of weights and cache."""
    parts = {name: count for name, count in figures.categories.items() if name != HOST}
    total = sum(parts.values())
    large = [(name, count / total) for name, count in parts.items() if count >= 0.005 * total][:most]
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in large)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _table(*headings: str) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("strategy", overflow="fold", min_width=21)
    for heading in headings:
        found.add_column(heading, justify="right", no_wrap=True)
    return found


def _name(row: Row) -> str:
    return row.strategy + (f"\n  {row.assumption}" if row.assumption else "")


def _fitting(row: Row, asked: bool) -> list[str]:
    if row.error:
        return ["no figures", *[""] * (3 + asked)]
    longest = "no limit" if row.longest is None else f"{row.longest:,}"
    at = row.at
    fits = ["" if at is None else "yes" if at.fits else "no"] if asked else []
    if at is None or not at.tokens:
        return [longest, *fits, "", "", ""]
    return [longest, *fits, size(at.worst), f"{at.bits:.2f} ({at.worst_bits:.2f})", f"{at.ratio:.2f}x"]
