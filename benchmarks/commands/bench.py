"""`cachequant bench`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..environment import Precision

if TYPE_CHECKING:
    from ..report.run import Run
    from ..sweep.cells import Result
    from ..sweep.job import Job
    from ..sweep.workbench import Workbench


def bench(
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="Specs such as uniform:bits=4, `all` for every installed variant, or a YAML file of a sweep; repeat, "
            "or separate by ';'. Caches of transformers are measured beside them. Default: all."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Specs such as passkey:samples=40; repeat, or separate by ';'. Default: perplexity."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, such as 512,1024: every task that has a length, at each of them.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results. An interrupted run goes on from there.")] = Path(
        "cachequant-bench"
    ),
    residual_length: Annotated[int, typer.Option(min=0, help="Newest tokens kept exact.")] = 32,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes: cpu, cuda, or auto to spread it.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    twin: Annotated[bool, typer.Option(help="Also measure the model's twin with outlier key channels.")] = True,
    baselines: Annotated[bool, typer.Option(help="Also measure the caches of transformers.")] = True,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text that strategies are calibrated on. Default: the rest of the standard library."),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="Windows to calibrate on, of 2048 tokens or as many as the model takes.")
    ] = 8,
    engine: Annotated[str, typer.Option(help="Who measures: local, or ray for a cluster.")] = "local",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure again what failed before.")] = False,
) -> None:
    """Measure memory against accuracy and time: strategies by tasks, on a model and on its outlier twin.

    Results come as they are measured and are kept, one folder each, under the output folder; what is there already is
    not measured again. Under torchrun the processes share one model.
    """
    from ..errors import Unusable
    from ..sweep import parallel
    from ..sweep.engines import ENGINES
    from ..sweep.job import Job
    from ..sweep.run import assist
    from ..sweep.store import Store
    from ..sweep.workbench import Workbench

    console = Console()
    try:
        if engine not in ENGINES:
            raise Unusable(f"no engine is called {engine!r}; use one of {', '.join(ENGINES)}", "--engine")
        specs, questions, sizes = _asked(strategies, tasks, lengths, baselines)
        job = Job(
            strategies=specs,
            tasks=questions,
            lengths=sizes,
            model=model,
            text=None if text is None else str(text),
            dtype=dtype,
            device=device,
            threads=threads,
            twin=twin,
            residual_length=residual_length,
            calibration_text=None if calibration_text is None else str(calibration_text),
            calibration_samples=calibration_samples,
        )
        if parallel.world_size() > 1:
            _require_local(engine)
        if not parallel.is_main():
            assist(Workbench(job))
        else:
            store = Store(out)
            with store.opened():
                _run(console, job, store, engine, retry_failed)
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    finally:
        parallel.stop()


def _require_local(engine: str) -> None:
    from ..errors import Unusable

    if engine != "local":
        raise Unusable(f"processes of torchrun measure together, --engine {engine} apart; choose one", "--engine")


def _run(console: Console, job: "Job", store: Any, engine: str, retry_failed: bool) -> None:
    from ..report.run import conditions, write_files
    from ..report.tables import failures, terminal_tables
    from ..sweep.engines import ENGINES
    from ..sweep.run import Unstored, sweep
    from ..sweep.workbench import Workbench

    workbench = Workbench(job)
    for note in workbench.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    found: list[Result] = []
    code = 0
    with _progress(console, workbench) as heard:

        def keep(result: "Result", kept: bool) -> None:
            found.append(result)
            heard(result, kept)

        try:
            sweep(workbench, store, ENGINES[engine], retry_failed=retry_failed, heard=keep)
        except KeyboardInterrupt:
            console.print("[yellow]interrupted;[/] the same command goes on from here")
            code = 130
        except Unstored as error:
            console.print(f"[red]stopped:[/] {escape(str(error))}", highlight=False)
            code = 1
    run = _record(workbench, found)
    for sheet in run.sheets():
        console.print(f"[bold]{escape(sheet.task)}[/]", highlight=False)
        for table in terminal_tables(sheet, console.width):
            console.print(table)
        for failure in failures(sheet):
            console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
    for paragraph in conditions(run):
        console.print(escape(paragraph), style="dim", highlight=False)
    if run.results:
        try:
            paths = write_files(run, store.folder)
        except OSError as error:
            console.print(f"[red]cannot write the reports:[/] {escape(str(error))}", highlight=False)
            raise typer.Exit(1) from None
        console.print(f"wrote {', '.join(path.name for path in paths)} to {escape(str(store.folder))}", highlight=False)
    if any(result.error for result in found) and not retry_failed:
        console.print("[dim]what failed is kept as it is; --retry-failed measures it again[/]")
    if code:
        raise typer.Exit(code)


def _asked(
    strategies: list[str] | None, tasks: list[str] | None, lengths: str | None, baselines: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Specs of strategies and tasks, and lengths. Raises Unusable."""
    from ..contenders import baselines as stock_caches
    from ..errors import Unusable
    from ..sweep.job import DEFAULT_TASKS, read_grid

    specs: list[str] = []
    questions = _split(tasks or [])
    try:
        sizes = [int(part) for part in lengths.split(",")] if lengths else []
        if any(size < 1 for size in sizes):
            raise ValueError(lengths)
    except ValueError:
        raise Unusable(
            f"cannot read {lengths!r}; write tokens separated by commas, such as 512,1024", "--lengths"
        ) from None
    for spec in _split(strategies or ["all"]):
        # a strategy may take a file too: preset:FILE
        if spec.endswith((".yaml", ".yml")) and (":" not in spec or Path(spec).is_file()):
            in_file, tasks_in_file, lengths_in_file = read_grid(Path(spec))
            specs += in_file
            # the command line goes before the file
            questions = questions or list(tasks_in_file)
            sizes = sizes or list(lengths_in_file)
        else:
            specs.append(spec)
    if not specs:
        raise Unusable("no strategies were given", "--strategies")
    beside = [candidate.spec for candidate in stock_caches()] if baselines else []
    return (*specs, *beside), tuple(questions) or DEFAULT_TASKS, tuple(sizes)


@contextmanager
def _progress(console: Console, workbench: "Workbench") -> Iterator[Any]:
    """Prints results as they come above a bar; what is in hand stands beside the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    waiting = {
        cell.key: f"{cell.strategy} on {cell.model.panel}" for cell in (planned.cell for planned in workbench.cells)
    }
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(waiting))

        def current() -> str:
            return escape(next(iter(waiting.values()), ""))

        def heard(result: "Result", kept: bool) -> None:
            waiting.pop(result.cell.key, None)
            progress.console.print(_line(result, kept), highlight=False, soft_wrap=True)
            progress.update(bar, advance=1, description=current())

        def calibrating(name: str, part: int, parts: int) -> None:
            progress.update(bar, description=f"{current()}: calibrating, {name} {part}/{parts}")

        workbench.listen(calibrating)
        progress.update(bar, description=current())
        yield heard


def _line(result: "Result", kept: bool) -> str:
    """One result as it scrolls by."""
    from ..report.run import metrics_of
    from ..report.tables import figure

    cell = result.cell
    where = f"{escape(cell.task.partition(':')[0])}  {escape(cell.strategy)} [dim]on {escape(cell.model.panel)}[/]"
    if result.outcome is None:
        return f"[red]failed[/] {where}  {escape(result.error or '')}"
    (metrics,) = metrics_of([result]).values()
    known = [metric for metric in metrics if metric.name in result.outcome.metrics][:2]
    figures = [f"{metric.label} {figure(metric, result.outcome.metrics[metric.name])}" for metric in known]
    memory = result.outcome.memory
    bits = f"{memory.bits_per_element:.2f} bits, " if memory else ""
    when = "[dim]kept[/]" if kept else f"[dim]{result.seconds:.1f} s[/]"
    return f"{where}  {bits}{', '.join(figures)}  {when}"


def _record(workbench: "Workbench", found: "list[Result]") -> "Run":
    """In the order of the plan, whatever order they came in."""
    from ..report.run import Run

    by_key = {result.cell.key: result for result in found}
    return Run(
        environment=workbench.environment,
        text=workbench.panels[0].text,
        models=tuple(panel.card for panel in workbench.panels),
        residual_length=workbench.job.residual_length,
        notes=tuple(workbench.notes),
        results=tuple(by_key[planned.cell.key] for planned in workbench.cells if planned.cell.key in by_key),
    )


def _split(specs: list[str]) -> list[str]:
    return [spec.strip() for text in specs for spec in text.split(";") if spec.strip()]
