"""What a run found, as tables for the terminal and for Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from .allocate import Allocation
from .bench import Figures
from .budget import SERVED_BITS
from .files import Study
from .search import Search

FIGURES = ("bits", "vs 16-bit", "held", "KL mean", "KL p99", "top-1")


class Sheet(NamedTuple):
    """A table; the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    bold: frozenset[int] = frozenset()
    """Rows that stand out."""


def sheets(study: Study) -> Iterator[Sheet]:
    """The tables of a study."""
    if study.allocation is not None:
        yield verified(study.allocation)
        yield layers(study.allocation)
    if study.search is not None:
        yield front(study.search, study.chosen)


def verified(allocation: Allocation) -> Sheet:
    """The preset among settings that are alike for all layers, on the text that nothing was tuned on."""
    entries = [(each.bits, each.strategy, each.verified) for each in allocation.settings]
    preset = (allocation.bits, "preset", allocation.verified)
    entries = sorted([*entries, preset], key=lambda entry: (entry[0], entry[2].kl))
    rows = [(name, *_figures(figures)) for _, name, figures in entries]
    title = f"Verified, budget {allocation.budget_bits:.3f} bits"
    return Sheet(title, ("setting", *FIGURES), rows, frozenset({entries.index(preset)}))


def layers(allocation: Allocation) -> Sheet:
    """What the preset gives to each layer."""
    rows = [(str(index), sides["key"], sides["value"]) for index, sides in sorted(allocation.layers.items())]
    return Sheet("The preset", ("layer", "keys", "values"), rows)


def front(search: Search, chosen: str | None) -> Sheet:
    """What no other trial beats in both, on either text."""
    rows = []
    for each in search.front:
        figures = ("failed",) * len(FIGURES) if each.verified is None else _figures(each.verified)
        rows.append((each.strategy, *figures, f"{each.tuning.kl:.4g}"))
    bold = {number for number, each in enumerate(search.front) if each.strategy == chosen}
    return Sheet("Pareto front, verified", ("strategy", *FIGURES, "KL, tuning text"), rows, frozenset(bold))


def summary(study: Study) -> Iterator[str]:
    """The outcome in sentences."""
    if study.allocation is not None:
        found, rival = study.allocation, study.allocation.rival
        yield (
            f"preset: {found.bits:.3f} bits per number packed, {SERVED_BITS / found.bits:.2f} times smaller than "
            f"{SERVED_BITS} bits; KL {found.verified.kl:.4g} on {study.text.name}"
        )
        if rival is not None:
            change = 1 - found.verified.kl / rival.verified.kl
            verdict = f"{change:.0%} less" if change > 0 else f"{-change:.0%} more"
            yield (
                f"the best setting alike for all layers within the budget, {rival.strategy}, holds {rival.bits:.3f} "
                f"bits and has KL {rival.verified.kl:.4g}: the preset diverges {verdict}"
            )
    if study.search is not None:
        trials = study.search.trials
        measured = sum(trial.figures is not None for trial in trials)
        repeated = sum(trial.repeats is not None for trial in trials)
        refused = len(trials) - measured - repeated
        yield f"{len(trials)} trials: {measured} measured, {repeated} repeated, {refused} refused or failed"
    yield (
        f"tuned on {study.tuning_text.name}, verified on {study.text.name}; {_windows(study.protocol.windows)} of "
        f"{study.protocol.length} tokens, newest {study.protocol.residual_length} exact; {study.model.panel}, "
        f"{study.model.dtype}; {study.environment}"
    )


def _windows(count: int) -> str:
    return f"{count} window" + "s" * (count != 1)


def terminal(sheet: Sheet) -> Table:
    """For rich."""
    table = Table(title=sheet.title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(sheet.columns):
        wordy = number == 0 or column in ("keys", "values")
        table.add_column(column, justify="left" if wordy else "right", overflow="fold")
    for number, row in enumerate(sheet.rows):
        table.add_row(*map(escape, row), style="bold" if number in sheet.bold else None)
    return table


def markdown(sheet: Sheet) -> str:
    """For a page."""
    rule = ["---", *("---" if column in ("keys", "values") else "---:" for column in sheet.columns[1:])]
    lines = [_line(sheet.columns), _line(rule)]
    for number, row in enumerate(sheet.rows):
        cells = [f"`{cell}`" if ":" in cell or cell == "uniform" else cell for cell in row]
        lines.append(_line(f"**{cell}**" if number in sheet.bold else cell for cell in cells))
    return "\n".join(lines)


def comparison(studies: Sequence[Study]) -> Sheet:
    """Presets beside the best settings alike for all layers, budget by budget."""
    rows = []
    for study in studies:
        found = study.allocation
        if found is None or found.plain_rival is None or found.rival is None:
            continue
        plain, kl = found.plain_rival, found.verified.kl
        rows.append(
            (
                study.model.panel,
                plain.strategy,
                f"{plain.verified.bits:.3f}",
                f"{plain.verified.kl:.4f}",
                f"{found.rival.verified.kl:.4f}",
                f"{found.verified.bits:.3f}",
                f"{kl:.4f}",
                f"{kl / plain.verified.kl - 1:+.0%}",
                f"{kl / found.rival.verified.kl - 1:+.0%}",
                f"{plain.verified.top1:.1%}",
                f"{found.verified.top1:.1%}",
            )
        )
    columns = (
        *("model", "best single setting", "bits", "KL", "KL, best split", "preset, bits", "KL"),
        *("to single", "to split", "top-1, single", "preset"),
    )
    return Sheet("Presets beside the best settings alike for all layers", columns, rows)


def _figures(figures: Figures) -> tuple[str, ...]:
    return (
        f"{figures.bits:.3f}",
        f"{SERVED_BITS / figures.bits:.2f}x" if figures.bits else "",
        f"{figures.held_bits:.3f}",
        f"{figures.kl:.4g}",
        f"{figures.kl_p99:.4g}",
        f"{figures.top1:.1%}",
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
