"""What a sweep found, as files: JSON, CSV, Markdown, a picture and a page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ... import registry
from ..environment import Environment
from ..subjects import ModelCard, TextCard
from ..sweep.cells import RESULTS_VERSION, Result
from ..tasks.base import Metric
from .files import csv_text, replace
from .sheet import Sheet, of_results
from .tables import failures, markdown_table

NAME = "leaderboard"
SHARE = "packed_share"


class Run(BaseModel):
    """The results of a sweep with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results_version: int = RESULTS_VERSION
    environment: Environment
    text: TextCard
    models: tuple[ModelCard, ...]
    residual_length: int
    notes: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()

    def sheets(self) -> list[Sheet]:
        """One per task and length."""
        return of_results(self.results, metrics_of(self.results))


def metrics_of(results: Iterable[Result]) -> dict[str, tuple[Metric, ...]]:
    """The metrics of the tasks of `results`, by the task's name.

    What a task does not declare, or one that is no longer installed, is shown under its own name.
    """
    found: dict[str, dict[str, Metric]] = {}
    for result in results:
        name = result.cell.task.partition(":")[0]
        if name not in found:
            found[name] = {metric.name: metric for metric in _declared(name)}
        directions = result.outcome.directions if result.outcome else {}
        for other in result.outcome.metrics if result.outcome else ():
            found[name].setdefault(other, Metric(name=other, label=other, better=directions.get(other, "higher")))
    # how much was read packed qualifies the others, and ranks nothing
    return {
        name: tuple(sorted(metrics.values(), key=lambda metric: metric.name == SHARE))
        for name, metrics in found.items()
    }


def conditions(run: Run) -> list[str]:
    """Without which the figures mean nothing; one paragraph each."""
    models = "; ".join(
        f"{card.panel}: {card.architecture}, {card.parameters / 1e6:.1f}M parameters, {card.dtype}, "
        f"context {card.context}"
        for card in run.models
    )
    return [
        f"Bits: device bytes as held in the end, all included, per cached number; packed: of the packed part alone, to "
        f"which long contexts converge; vs 16-bit: how many times smaller than a 16-bit cache. Newest "
        f"{run.residual_length} tokens kept exact.",
        f"{models}.",
        f"Text: {run.text.name}, sha256 {run.text.sha256[:12]}. {run.environment}.",
        *_calibrations(run),
        *_host_copies(run),
        *_older(run),
        *run.notes,
    ]


def markdown(run: Run) -> str:
    """Every task's table, and the conditions."""
    parts = []
    for sheet in run.sheets():
        summary = _summary(sheet.task)
        parts += [f"### `{sheet.task}`", *([summary] if summary else []), markdown_table(sheet)]
        parts.append(f"Bold: on the Pareto front of bits per element and {sheet.headline.label} of its model.")
        if failed := failures(sheet):
            parts.append("\n".join(f"- failed: {each}" for each in failed))
    return "\n\n".join([*parts, *conditions(run)]) + "\n"


def write_files(run: Run, folder: Path) -> list[Path]:
    """`leaderboard.json`, `.csv`, `.md`, `.png` and `report.html`; returns their paths.

    A reader sees the old files or the new ones, never half of one. Raises OSError.
    """
    # imported here: a sweep can be run and printed without matplotlib
    from .chart import draw
    from .page import write_page
    from .page_of import page_of

    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / f"{NAME}.json", _without_samples(run).model_dump_json(indent=2) + "\n")
    replace(folder / f"{NAME}.csv", csv_text([_flat(result) for result in run.results]))
    replace(folder / f"{NAME}.md", markdown(run))
    paths = [folder / f"{NAME}.{kind}" for kind in ("json", "csv", "md")]
    for number, sheet in enumerate(run.sheets()):
        path = folder / (f"{NAME}.png" if number == 0 else f"{NAME}-{number + 1}.png")
        draw(sheet, path, _title(run, sheet))
        paths.append(path)
    write_page(page_of(run), folder / "report.html")
    return [*paths, folder / "report.html"]


def _declared(name: str) -> tuple[Metric, ...]:
    try:
        return registry.tasks.get(name).metrics
    except LookupError:
        return ()


def _summary(task: str) -> str:
    try:
        return registry.tasks.describe(task.partition(":")[0]).summary
    except LookupError:
        return ""


def _calibrations(run: Run) -> list[str]:
    """One line for those that had to learn from a text before; rows that read the same statistics share a card."""
    learned = [result for result in run.results if result.calibration]
    if not learned:
        return []
    cards = {(each.cell.model.panel, each.calibration): each.calibration for each in learned}.values()
    texts = dict.fromkeys(
        f"{card.windows} windows of {card.length} tokens of the text {card.text}, sha256 {card.sha256[:12]}"
        for card in cards
        if card
    )
    specs = ", ".join(dict.fromkeys(each.cell.strategy for each in learned))
    return [f"Calibrated for each model first, on {'; '.join(texts)}: {specs}."]


def _host_copies(run: Run) -> list[str]:
    """One line for those that keep exact copies outside the device, which their bits do not count."""
    sizes = {
        each.cell.strategy: each.outcome.memory.host_bytes
        for each in run.results
        if each.outcome and each.outcome.memory and each.outcome.memory.host_bytes
    }
    if not sizes:
        return []
    named = ", ".join(f"{strategy} {size / 2**20:.1f} MiB" for strategy, size in sizes.items())
    return [f"Kept in host memory beside these bits: {named}."]


def _older(run: Run) -> list[str]:
    """Rows kept from earlier runs may come from another day or another process."""
    others = [each for each in run.results if each.environment.date < run.environment.date]
    if not others:
        return []
    days = sorted({each.environment.date[:10] for each in others})
    return [f"{len(others)} of {len(run.results)} results are from earlier runs ({', '.join(days)})."]


def _without_samples(run: Run) -> Run:
    """They are in the predictions of each cell."""
    slim = [
        each.model_copy(update={"outcome": each.outcome.model_copy(update={"samples": ()})}) if each.outcome else each
        for each in run.results
    ]
    return run.model_copy(update={"results": tuple(slim)})


def _flat(result: Result) -> dict[str, Any]:
    line: dict[str, Any] = {
        "task": result.cell.task,
        "panel": result.cell.model.panel,
        "strategy": result.cell.strategy,
        "error": result.error,
        "seconds": result.seconds,
    }
    if result.outcome:
        line |= result.outcome.metrics
        line |= {f"{name}_standard_error": value for name, value in result.outcome.errors.items()}
        if result.outcome.memory:
            line |= {f"memory_{name}": value for name, value in result.outcome.memory.model_dump().items()}
        line |= {f"latency_{name}": value for name, value in result.outcome.latency.items()}
    if result.calibration:
        line |= {f"calibration_{name}": value for name, value in result.calibration.model_dump().items()}
    return line


def _title(run: Run, sheet: Sheet) -> str:
    card = run.models[0]
    name, _, settings = sheet.task.partition(":")
    how = f" ({settings.replace('=', ' ').replace(',', ', ')})" if settings else ""
    return f"KV-cache quantization: {name}{how} against memory held\n{card.architecture} {card.dtype}, {run.text.name}"
