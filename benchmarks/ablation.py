"""What every setting of a strategy is worth: all combinations of some fields, measured like a leaderboard.

    python -m cachequant.benchmarks.ablation kvquant --vary bits=4,3,2 --vary datatype=int,nf,nuq --vary outliers=0,0.01

writes the leaderboard of all combinations, and `ablation.md`: how the divergence changes when one field alone changes,
averaged over all settings of the others.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track

from . import contenders, leaderboard
from .errors import Unusable, message
from .leaderboard import Leaderboard, Row
from .report import board as report

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

Setting = tuple[str, ...]
"""One value for every varied field, as text."""


class Field(NamedTuple):
    """A field and the values it takes."""

    name: str
    values: tuple[str, ...]


class Effect(NamedTuple):
    """One field at another value than its first, everything else equal."""

    field: str
    value: str
    group: str
    """Value of the field by which effects are told apart."""
    ratio: float
    """Geometric mean of the divergence at this value over that at the first."""
    better: int
    """In how many pairs the divergence is smaller."""
    pairs: int


def combinations(name: str, fields: list[Field]) -> dict[Setting, str]:
    """The spec of every combination. name: a strategy, or a spec whose other fields stay."""
    joint = "," if ":" in name else ":"
    return {
        values: name + joint + ",".join(f"{field.name}={value}" for field, value in zip(fields, values, strict=True))
        for values in itertools.product(*(field.values for field in fields))
    }


def effects(fields: list[Field], divergence: dict[Setting, float], by: int = 0) -> Iterator[Effect]:
    """Of every field but number `by`, for each value of that one apart. Settings without a figure are left out."""
    for number, field in enumerate(fields):
        if number == by:
            continue
        for value, group in itertools.product(field.values[1:], fields[by].values):
            ratios = []
            for setting, changed in divergence.items():
                if setting[number] != value or setting[by] != group:
                    continue
                first = divergence.get((*setting[:number], field.values[0], *setting[number + 1 :]))
                if first and changed:
                    ratios.append(changed / first)
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                yield Effect(field.name, value, group, mean, sum(ratio < 1 for ratio in ratios), len(ratios))


def markdown(fields: list[Field], board: Leaderboard, specs: dict[Setting, str], by: int = 0) -> str:
    """Tables of effects, one per model."""
    parts = []
    groups = fields[by].values
    for card in board.models:
        divergence = {
            setting: row.accuracy.kl_mean
            for setting, spec in specs.items()
            for row in board.rows
            if row.panel == card.panel and row.strategy == spec and row.accuracy
        }
        lines = [["field", "from", "to", *(f"{fields[by].name}={group}" for group in groups)]]
        lines.append(["---"] * 3 + ["---:"] * len(groups))
        found = {(each.field, each.value, each.group): each for each in effects(fields, divergence, by)}
        for field, value in dict.fromkeys((field, value) for field, value, _ in found):
            first = next(each.values[0] for each in fields if each.name == field)
            cells = [found.get((field, value, group)) for group in groups]
            shown = [f"x{each.ratio:.2f} ({each.better}/{each.pairs})" if each else "-" for each in cells]
            lines.append([f"`{field}`", first, value, *shown])
        parts.append(f"### {card.panel}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append(
        "Mean KL divergence at the second value as a multiple of that at the first, geometric mean over all settings "
        "of the other fields; in brackets, in how many of the pairs it is smaller."
    )
    return "\n\n".join(parts) + "\n"


@app.command()
def main(
    strategy: Annotated[str, typer.Argument(help="A strategy's name, or a spec whose fields all combinations share.")],
    vary: Annotated[
        list[str], typer.Option(help="field=value,value,...; repeat. Effects are told apart by the first.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for ablation.md and the leaderboard's files.")],
    also: Annotated[list[str] | None, typer.Option(help="Further specs for the leaderboard; repeat.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    calibration_text: Annotated[Path | None, typer.Option(help="Text to calibrate on, as for `bench`.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of text, evaluated as one batch.")] = 6,
    twin: Annotated[bool, typer.Option(help="Also measure the model's twin with outlier key channels.")] = True,
) -> None:
    """Measure all combinations of some fields of a strategy."""
    fields = [_field(each) for each in vary]
    try:
        candidates = {
            setting: contenders.candidates([spec])[0] for setting, spec in combinations(strategy, fields).items()
        }
        others = contenders.candidates(also or [])
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(message(error), param_hint="--vary") from error
    chosen = [*candidates.values(), *others]
    calibrating = any(map(contenders.needs_calibration, chosen))
    try:
        board, subjects = leaderboard.prepare(
            model, text, windows=windows, twin=twin, calibration_text=calibration_text, calibrating=calibrating
        )
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    measured = leaderboard.run(subjects, chosen)
    for row in track(measured, total=len(chosen) * len(subjects), console=Console(stderr=True)):
        rows.append(row)
        report.write_json(board.with_rows(rows), out)  # an interrupted sweep keeps what it has
    board = board.with_rows(rows)
    report.write_all(board, out)
    text_of = markdown(fields, board, {setting: candidate.spec for setting, candidate in candidates.items()})
    (out / "ablation.md").write_text(text_of, encoding="utf-8")
    Console().print(text_of, markup=False, highlight=False)


def _field(text: str) -> Field:
    name, _, values = text.partition("=")
    if not name or "," not in values:
        raise typer.BadParameter(
            f"{text!r} is no field with at least two values; write bits=4,3,2", param_hint="--vary"
        )
    return Field(name.strip(), tuple(value.strip() for value in values.split(",")))


if __name__ == "__main__":
    app()
