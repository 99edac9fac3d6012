"""What the kernels do on a GPU: are they right, how fast are they, and how fast is a model that uses them.

    python -m cachequant.benchmarks.gpu --budget 480

In this order: the ceilings of the device's memory, and that its matrix units keep float16 subnormals; that compiled
kernels agree with the reference, without which nothing is timed; attention against the best that reads 16 bits;
encoding; whole models. It watches the clock, leaves out what no longer fits, says so, and writes what it has.

`--dry` runs the same logic on the CPU in Triton's interpreter, with tiny shapes and no timings.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from .machine import Clock, Machine
    from .results import Results

# by which the budget is shared out
SECTIONS = {"ceilings": 4, "correctness": 24, "attention": 32, "encode": 5, "models": 35}
# kept back for writing files
WRITING_SECONDS = 6

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    budget: Annotated[float, typer.Option(min=1, help="Seconds that everything may take.")] = 480,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.md and gpu.png.")] = Path("cachequant-gpu"),
    only: Annotated[
        str | None, typer.Option(help=f"Sections to run, separated by ','. Default: {','.join(SECTIONS)}.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="On the CPU, in Triton's interpreter, with tiny shapes: no timings.")
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit of these sources, for the report, where they are no checkout.")
    ] = None,
) -> None:
    """Check and time the kernels on the GPU that is current."""
    chosen = _chosen(only)
    if dry:
        # before any kernel is defined
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from ...kernels import backend

    # a log file is no narrow terminal
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device() if _cuda() else 0)
    problem = backend.triton_problem(device)
    if problem is None and not dry and backend.interpreted():
        problem = "TRITON_INTERPRET is set, so that nothing would be compiled"
    if problem is not None:
        where = "the interpreter cannot be used" if dry else "no GPU to measure"
        hint = "" if dry else "; --dry proves the logic without one"
        typer.echo(f"{where}: {problem}{hint}", err=True)
        raise typer.Exit(2)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {out}: {error.strerror}", param_hint="--out") from error

    from . import report
    from .machine import Clock, Machine
    from .results import Hardware, Results

    clock = Clock(max(1.0, budget - WRITING_SECONDS), {name: SECTIONS[name] for name in chosen})
    results = Results(hardware=Hardware.current(device, commit), dry=dry, budget_s=budget, sections=tuple(chosen))
    console.print(escape(report.title(results)), style="bold", highlight=False)
    console.print(escape(report.conditions(results)), style="dim", highlight=False)
    stop = None
    try:
        with torch.inference_mode():
            stop = _run(console, Machine(device, clock), clock, results, out)
    except KeyboardInterrupt:
        results.notes.append("interrupted")
        stop = "interrupted; what was measured is written"
    paths = report.write(results, out)
    for heading, lines in (("left out", results.skipped), ("failed", results.failures)):
        for line in lines:
            console.print(f"[yellow]{heading}:[/] {escape(line)}", highlight=False)
    if dry:
        console.print(report.DRY)
    console.print(f"wrote {', '.join(path.name for path in paths)} to {escape(str(out))}", highlight=False)
    if stop is not None:
        console.print(f"[red]stopped:[/] {escape(stop)}", highlight=False)
        raise typer.Exit(1)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _chosen(only: str | None) -> list[str]:
    names = list(SECTIONS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise typer.BadParameter(f"{only!r}: use some of {','.join(SECTIONS)}", param_hint="--only")
    return [name for name in SECTIONS if name in names]


# ---- sections --------------------------------------------------------------------------------------------------------


def _run(console: Console, machine: "Machine", clock: "Clock", results: "Results", out: Path) -> str | None:
    """All sections; returns why it stopped early, if it did."""
    from .ceilings import FlushedSubnormals
    from .correctness import WrongResult
    from .report import write_json
    from .results import message

    work = {
        "ceilings": _ceilings,
        "correctness": _correctness,
        "attention": _attention,
        "encode": _encode,
        "models": _models,
    }
    for name in results.sections:
        try:
            with clock.section(name, results.spent_s):
                for part in work[name](machine, results):
                    _show(console, results, part)
                    write_json(results, out)
        except (FlushedSubnormals, WrongResult) as error:
            results.failures.append(str(error))
            return str(error)
        except Exception as error:  # a section that breaks must not take the others with it
            results.failures.append(f"{name}: {message(error)}")
        finally:
            write_json(results, out)
        try:
            machine.free()
        except Exception as error:
            # the device does not recover within this process
            results.failures.append(f"after {name}: {message(error)}")
            return f"the device does not answer after {name}: {message(error)}"
    return None


def _show(console: Console, results: "Results", part: Any) -> None:
    """Print a sheet, or take a sentence to where it belongs."""
    from .report import Sheet, table

    if isinstance(part, Sheet):
        console.print(table(part))
        return
    kind, _, text = part.partition(": ")
    if kind == "note":
        results.notes.append(text)
        console.print(escape(text), style="dim", highlight=False)
    elif kind == "failed":
        results.failures.append(text)
    else:
        results.skipped.append(part)


def _ceilings(machine: "Machine", results: "Results") -> Iterator[Any]:
    from . import ceilings, report

    results.exactness = ceilings.subnormals(machine)
    yield report.exactness(results.exactness)
    ceilings.require_subnormals(results.exactness)
    results.ceilings = ceilings.measure(machine)
    yield report.ceilings(results.ceilings)


def _correctness(machine: "Machine", results: "Results") -> Iterator[Any]:
    from . import correctness, report

    for part in correctness.run(machine):
        if isinstance(part, str):
            yield part
            continue
        results.checks.append(part)
        if part.failure is not None:
            yield f"failed: {part.case} ({part.variant}): {part.failure}"
    yield report.checks(results.checks)
    correctness.require_right(results.checks)


def _attention(machine: "Machine", results: "Results") -> Iterator[Any]:
    from . import attention, report

    for part in attention.run(machine, results.ceilings.read_tb_s if results.ceilings else None):
        if isinstance(part, str):
            yield part
            continue
        results.attention += part
        yield from report.attention(part)


def _encode(machine: "Machine", results: "Results") -> Iterator[Any]:
    from . import encoding, report

    for part in encoding.run(machine):
        if isinstance(part, str):
            yield part
        else:
            results.encode.append(part)
    yield report.encode(results.encode)


def _models(machine: "Machine", results: "Results") -> Iterator[Any]:
    from . import models, report
    from .results import DecodeTiming, PrefillTiming

    shown: list[DecodeTiming] = []
    for part in models.run(machine):
        if isinstance(part, PrefillTiming):
            results.prefill.append(part)
        elif isinstance(part, DecodeTiming):
            results.decode.append(part)
            if shown and (shown[-1].model, shown[-1].tokens) != (part.model, part.tokens):
                yield from report.decode(shown)
                shown = []
            shown.append(part)
        else:
            yield part
    yield from report.decode(shown)
    yield report.prefill(results.prefill)


if __name__ == "__main__":
    app()
