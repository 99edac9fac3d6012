"""`cachequant new`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by hyphens, such as my-strategy.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to. Default: one of that name, here.")] = None,
    author: Annotated[str | None, typer.Option(help="Your name, for the package's metadata.")] = None,
) -> None:
    """Write an installable package with a strategy of your own: it works, is tested, and is yours to change."""
    from ..errors import Unusable
    from ..scaffold.package import write_package

    folder = Path(name) if out is None else out
    try:
        written = write_package(name, folder, author)
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    where = shlex.quote(str(folder))
    typer.echo(f"wrote {', '.join(str(path.relative_to(folder.expanduser())) for path in written)} to {folder}; next:")
    typer.echo(f"  pip install -e {shlex.quote(f'{folder}[test]')}")
    typer.echo(f"  pytest {where}")
    typer.echo(f'  cachequant bench --strategies "{name};uniform"')
