"""The command `cachequant`: what is installed, and what it costs and saves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import registry
from .environment import Precision

if TYPE_CHECKING:
    from .leaderboard import Candidate, Leaderboard, Row, Subject

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Interchangeable KV-cache quantization for transformers."""


@app.command("list")
def list_strategies() -> None:
    """Show the installed strategies and their settings."""
    console = Console()
    for name in registry.names():
        description = registry.describe(name)
        plugin = "" if description.plugin.startswith("cachequant:") else f" [dim](from {escape(description.plugin)})[/]"
        console.print(f"[bold]{escape(name)}[/]{plugin}  {escape(description.summary)}", highlight=False)
        if not description.fields:
            console.print("[dim]  no settings[/]\n")
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("field", "type", "default", "allowed", "description"):
            table.add_column(heading, overflow="fold")
        for field in description.fields:
            allowed = ", ".join([*map(_value, field.allowed), *field.constraints])
            default = "required" if field.required else _value(field.default)
            # the alternatives stand in a column of their own
            kind = " | ".join(dict.fromkeys(type(value).__name__ for value in field.allowed)) or field.type
            table.add_row(
                *map(escape, (field.name, kind.replace("NoneType", "None"), default, allowed, field.description))
            )
        console.print(table)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.json, .csv, .md and .png.")] = Path(
        "cachequant-bench"
    ),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(help="Specs such as uniform:bits=4; repeat, or separate by ';'. Default: all variants installed."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of text, evaluated as one batch.")] = 6,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: 1024 beyond the residual, if the model takes them.")
    ] = None,
    residual_length: Annotated[int, typer.Option(min=0, help="Newest tokens kept exact.")] = 32,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    twin: Annotated[bool, typer.Option(help="Also measure the model's twin with outlier key channels.")] = True,
) -> None:
    """Measure memory against accuracy, every strategy on the model and on its outlier twin."""
    import torch

    from . import leaderboard, report
    from .subjects import Unusable, prepare

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        chosen = leaderboard.candidates(_split(strategies)) if strategies else leaderboard.installed()
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(leaderboard.message(error), param_hint="--strategies") from error
    _writable(out)
    try:
        board, subjects = prepare(
            model,
            text,
            windows=windows,
            window_length=window_length,
            residual_length=residual_length,
            dtype=getattr(torch, dtype.value),
            device=device,
            twin=twin,
        )
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    for note in board.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    rows: list[Row] = []
    finished = False
    try:
        _measure(console, board, subjects, chosen, rows, out)
        finished = True
    except KeyboardInterrupt:
        console.print("[yellow]interrupted;[/] writing what was measured")
    board = board.with_rows(rows)
    paths = report.write_all(board, out)
    for table in report.terminal_tables(board, console.width):
        console.print(table)
    console.print(escape(report.describe(board)), style="dim", highlight=False)
    for failure in report.failures(board):
        console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
    console.print(f"wrote {', '.join(path.name for path in paths)} to {escape(str(out))}", highlight=False)
    if not finished:
        raise typer.Exit(130)


def _measure(
    console: Console,
    board: "Leaderboard",
    subjects: "list[Subject]",
    chosen: "list[Candidate]",
    rows: "list[Row]",
    out: Path,
) -> None:
    """Fill `rows`, each written out as it comes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import leaderboard, report

    plan = [f"{candidate.spec} on {subject.card.panel}" for candidate in chosen for subject in subjects]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(plan[0]) if plan else "", total=len(plan))
        for row in leaderboard.run(subjects, chosen):
            rows.append(row)
            report.write_json(board.with_rows(rows), out)
            progress.update(task, advance=1, description=escape(plan[min(len(rows), len(plan) - 1)]))


def _writable(folder: Path) -> None:
    """Make the folder, and find out before hours of work whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}", param_hint="--out") from error


def _split(specs: list[str]) -> list[str]:
    return [spec.strip() for text in specs for spec in text.split(";") if spec.strip()]


def _value(value: Any) -> str:
    """As it is written in a spec."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    app()
