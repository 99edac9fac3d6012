"""`cachequant compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Output folder of cachequant bench.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, or the same to compare two strategies in it.")],
    strategy_a: Annotated[str | None, typer.Option(help="Spec of the strategy of A, to compare two.")] = None,
    strategy_b: Annotated[str | None, typer.Option(help="Spec of the strategy of B.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the comparison to this Markdown file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare two runs, strategy by strategy, or two strategies: differences with 95 % intervals, ratios of memory."""
    from ..report.compare import Incomparable
    from ..report.compare import compare as compare_runs
    from ..report.compare_tables import markdown, notes, terminal_tables
    from ..report.files import replace
    from ..sweep.store import Unreadable

    strategies = _strategies(strategy_a, strategy_b)
    if strategies is None and a.resolve() == b.resolve():
        raise typer.BadParameter(f"A and B are both {a}; give --strategy-a and --strategy-b to compare two strategies")
    try:
        found = compare_runs(a, b, strategies)
    except (Unreadable, Incomparable) as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        try:
            replace(out, markdown(found))
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = Console()
    console.print(f"A: {escape(found.a)}\nB: {escape(found.b)}", highlight=False, soft_wrap=True)
    for heading, tables in terminal_tables(found):
        console.print(f"\n[bold]{escape(heading)}[/]", highlight=False)
        for name, table in tables:
            console.print(f"\n{escape(name)}", highlight=False, soft_wrap=True)
            console.print(table)
    for title, lines in notes(found):
        console.print(f"[bold]{title}[/]", highlight=False)
        for line in lines:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"wrote {escape(str(out))}", highlight=False, soft_wrap=True)


def _strategies(a: str | None, b: str | None) -> tuple[str, str] | None:
    """Both specs as results name them."""
    from ..contenders import candidate

    if a is None and b is None:
        return None
    if a is None or b is None:
        missing = "--strategy-a" if a is None else "--strategy-b"
        raise typer.BadParameter("two strategies are compared, and one is missing", param_hint=missing)
    specs = []
    for spec in (a, b):
        try:
            specs.append(candidate(spec).spec)
        except (LookupError, ValueError, OSError):
            specs.append(spec)  # of a plugin that is not installed here
    return specs[0], specs[1]
