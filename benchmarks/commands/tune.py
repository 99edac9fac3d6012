"""`cachequant tune`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..environment import Precision

if TYPE_CHECKING:
    from ..tune.bench import Material
    from ..tune.budget import Budget
    from ..tune.files import Study
    from ..tune.journal import Journal


class Method(StrEnum):
    """How settings are found."""

    allocate = "allocate"
    search = "search"


class Sampler(StrEnum):
    """Who proposes trials."""

    tpe = "tpe"
    nsga2 = "nsga2"


def tune(
    budget: Annotated[
        str | None,
        typer.Option(
            help="3.5 (bits per number, metadata included), x4 (times smaller than 16 bits) or 2048B a token."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="allocate: bits per layer and side under a budget. search: fields of whole strategies, memory against "
            "divergence."
        ),
    ] = Method.allocate,
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="Specs, repeated or separated by ';'. allocate takes each at every width, search varies what the spec "
            "leaves open. Default: uniform, and its remedies for outlier channels."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to verify on. Default: held-out standard library.")
    ] = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to tune and calibrate on. Default: the rest of the standard library."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File for the preset; study and measurements lie beside. Interrupted, it goes on.")
    ] = Path("cachequant-preset.json"),
    trials: Annotated[int, typer.Option(min=1, help="search: combinations to try.")] = 40,
    sampler: Annotated[Sampler, typer.Option(help="search: who proposes them.")] = Sampler.tpe,
    seed: Annotated[int, typer.Option(help="search: of the proposals.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="allocate: rounds in which moves are measured in company.")] = 2,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of either text, evaluated as one batch.")] = 6,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: 1024 beyond the residual, if the model takes them.")
    ] = None,
    residual_length: Annotated[int, typer.Option(min=0, help="Newest tokens kept exact.")] = 32,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Find settings for a memory budget by measuring, and write them as a preset.

    What is found on one text is verified on another. `preset:FILE` names the preset wherever a strategy is asked for.
    """
    given = [spec.strip() for each in strategies or () for spec in each.split(";") if spec.strip()]
    limit = _budget(budget, method)
    _writable(out)
    if method is Method.search:
        _require_optuna()

    import torch

    from ..errors import Unusable, message
    from ..tune.bench import gather
    from ..tune.files import journal_file
    from ..tune.journal import Journal, Occupied

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        over = _checked(given, method)
        (material,), notes = gather(
            model,
            text,
            calibration_text,
            windows=windows,
            window_length=window_length,
            residual_length=residual_length,
            dtype=getattr(torch, dtype.value),
            device=device,
        )
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    try:
        with Journal(journal_file(out), material.about).opened() as journal:
            if journal.resumed:
                console.print(f"{journal.resumed} measurements of an earlier run are there already", style="dim")
            if method is Method.allocate:
                assert limit is not None  # see `_budget`
                _allocate(console, material, journal, over, limit, rounds, out, bool(given))
            else:
                _search(console, material, journal, over, limit, trials, seed, sampler, out)
    except Occupied as error:
        raise typer.BadParameter(message(error), param_hint="--out") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot write {error.filename}: {error.strerror}", param_hint="--out") from error
    except KeyboardInterrupt:
        console.print("[yellow]interrupted;[/] the same command goes on from here")
        raise typer.Exit(130) from None


def _allocate(
    console: Console,
    material: "Material",
    journal: "Journal",
    over: list[str],
    budget: "Budget",
    rounds: int,
    out: Path,
    asked: bool,
) -> None:
    from ..errors import message
    from ..tune.allocate import allocate
    from ..tune.bench import Bench
    from ..tune.files import Study
    from ..tune.menu import block_of, compose

    with _progress(console) as report:
        try:
            bench = Bench(material.verifying, material.tuning, material.task, block_of(over), journal)
            menu, notes = compose(bench, over, lenient=not asked)
        except (LookupError, ValueError) as error:
            raise typer.BadParameter(message(error), param_hint="--strategies") from error
        try:
            found, preset = allocate(bench, menu, budget, rounds, report)
        except ValueError as error:
            raise typer.BadParameter(message(error), param_hint="--budget") from error
    study = Study.of(bench, strategies=tuple(over), budget=budget, allocation=found, notes=tuple(notes))
    _finish(console, study, preset, out)


def _search(
    console: Console,
    material: "Material",
    journal: "Journal",
    over: list[str],
    budget: "Budget | None",
    trials: int,
    seed: int,
    sampler: Sampler,
    out: Path,
) -> None:
    from ... import registry
    from ..streaming import SMALLEST_BLOCK
    from ..tune.bench import Bench
    from ..tune.files import Study
    from ..tune.search import search, spaces

    bench = Bench(material.verifying, material.tuning, material.task, SMALLEST_BLOCK, journal)
    with _progress(console) as report:
        found = search(bench, spaces(over), trials, seed, sampler.value, report)
    chosen = preset = None
    notes: list[str] = []
    if budget is not None:
        elements = sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in bench.shapes())
        best = found.within(budget.bits(elements))
        if best is None:
            nearest = min((each.verified.bits for each in found.front if each.verified), default=None)
            there = "nothing could be verified" if nearest is None else f"the smallest found takes {nearest:.3f} bits"
            notes.append(f"no trial keeps the budget of {budget.bits(elements):.3f} bits per number: {there}")
        else:
            chosen = best.strategy
            preset = _preset(bench.ready(registry.parse(chosen)), notes)
    study = Study.of(bench, strategies=tuple(over), budget=budget, search=found, chosen=chosen, notes=tuple(notes))
    _finish(console, study, preset, out)


def _preset(strategy: Any, notes: list[str]) -> Any | None:
    """The strategy for all layers, unless it is one that no preset holds."""
    from ... import registry
    from ..errors import message

    try:
        return registry.get("preset")(default=strategy)
    except ValueError as error:
        notes.append(f"no preset was written: {message(error)}")
        return None


def _finish(console: Console, study: "Study", preset: Any | None, out: Path) -> None:
    """Files, tables, and how to use what was found."""
    from ..tune.files import study_file, write_preset, write_study
    from ..tune.report import sheets, summary, terminal

    written = [study_file(out)]
    write_study(study, study_file(out))
    if preset is not None:
        written = [*write_preset(preset, out, study), *written]
    for sheet in sheets(study):
        console.print(terminal(sheet))
    for line in summary(study):
        console.print(escape(line), highlight=False)
    for note in study.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    console.print(f"wrote {escape(', '.join(map(str, written)))}", highlight=False, soft_wrap=True)
    if preset is not None:
        console.print(f"use it with  registry.parse({f'preset:{out}'!r})", highlight=False, soft_wrap=True)
    elif study.chosen is not None:
        console.print(f"use it with  registry.parse({study.chosen!r})", highlight=False, soft_wrap=True)
    elif study.search is not None and study.budget is None:
        console.print("the same command with --budget chooses one of them and writes its preset", highlight=False)


def _budget(text: str | None, method: Method) -> "Budget | None":
    from ..errors import message
    from ..tune.budget import Budget

    if text is None:
        if method is Method.allocate:
            raise typer.BadParameter(
                "bits are allocated under a budget; give one, such as 3.5 or x4, or use --method search",
                param_hint="--budget",
            )
        return None
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise typer.BadParameter(message(error), param_hint="--budget") from error


def _checked(given: list[str], method: Method) -> list[str]:
    """The strategies asked for, or the default ones, refused before anything is loaded if they are unknown."""
    from ..errors import message
    from ..tune.menu import DEFAULT, block_of
    from ..tune.search import spaces

    try:
        if method is Method.search:
            over = given or ["uniform"]
            spaces(over)
        else:
            over = given or list(DEFAULT)
            block_of(over)
    except (LookupError, ValueError, OSError) as error:
        raise typer.BadParameter(message(error), param_hint="--strategies") from error
    return over


def _writable(out: Path) -> None:
    from ..tune.files import require_writable

    try:
        require_writable(out)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error


def _require_optuna() -> None:
    from ..tune.search import require_optuna

    try:
        require_optuna()
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=total)

        yield report
