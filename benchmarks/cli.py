"""The command `cachequant`. Each subcommand is a function of `commands/`; what is slow to import, it imports itself."""

import typer

from .commands.bench import bench
from .commands.calibrate import calibrate
from .commands.compare import compare
from .commands.doctor import doctor
from .commands.listing import list_all
from .commands.new import new
from .commands.plan import plan
from .commands.tune import tune

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Interchangeable KV-cache quantization for transformers."""


app.command("list")(list_all)
for command in (new, bench, compare, plan, tune, calibrate, doctor):
    app.command()(command)


if __name__ == "__main__":
    app()
