"""`cachequant doctor`."""

from typing import Annotated

import typer
from rich.console import Console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say which kernels serve each device here and why others do not, and what is installed."""
    from ..doctor import examine, report

    diagnosis = examine()
    if as_json:
        typer.echo(diagnosis.model_dump_json(indent=2))
        return
    console = Console()
    for part in report(diagnosis):
        console.print(part, highlight=False)
