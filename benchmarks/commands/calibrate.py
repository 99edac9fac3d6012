"""`cachequant calibrate`."""

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ... import registry
from ..environment import Precision

if TYPE_CHECKING:
    from ...core.calibration import CalibratedStrategy, Evidence


def calibrate(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="Strategy, such as kvquant or kvquant:bits=3,outliers=0.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the calibration. An interrupted one is continued from there.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to learn from. Default: the standard library, less what bench reads."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows, spread evenly over the text.")] = 16,
    length: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: 2048, or as many as the model takes.")
    ] = None,
    heldout: Annotated[
        int, typer.Option(min=0, help="Further windows, from the end of the text, to measure perplexity on.")
    ] = 1,
    dtype: Annotated[Precision, typer.Option(help="Dtype of the model.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished calibration.")] = False,
) -> None:
    """Let a strategy learn from a text, once for a model, and keep what it learned in a folder."""
    strategy = _learning(spec)
    _vacant(out, overwrite)
    _writable(out)

    import torch

    from ...core.calibration import Calibration
    from ...core.calibration.resume import FILE, Unresumable
    from ..errors import Unusable, message
    from ..subjects import calibration_windows, load_model, read_text

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        name, content = read_text(text, "train", "--text")
        _, loaded, tokenizer = load_model(model, getattr(torch, dtype.value), device)
        windows = calibration_windows(loaded, tokenizer, content, samples, length, heldout)
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    try:
        with _window_by_window(console) as report:
            calibrated = strategy.calibrate(
                loaded, None, windows, samples=samples, heldout=heldout, folder=out, report=report
            )
        saved = calibrated.save_pretrained(out)
    except KeyboardInterrupt:
        kept = out / FILE
        rest = f"the same command goes on from {escape(str(kept))}" if kept.exists() else "nothing was kept"
        console.print(f"[yellow]interrupted;[/] {rest}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except Unresumable as error:
        raise typer.BadParameter(message(error), param_hint="--out") from error
    except torch.OutOfMemoryError as error:
        raise typer.BadParameter(f"{message(error)}; use shorter windows", param_hint="--length") from error
    except ValueError as error:
        raise typer.BadParameter(message(error)) from error
    assert isinstance(saved.calibration, Calibration)  # just made
    size = sum(path.stat().st_size for path in _files(out))
    for line in _summary(saved, saved.calibration.record.evidence, name, size, out, model):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _learning(spec: str) -> "CalibratedStrategy":
    """The strategy of a spec, which has to be one that learns from a text."""
    from ...core.calibration import CalibratedStrategy
    from ..errors import message

    try:
        strategy = registry.parse(spec)
    except (LookupError, ValueError, OSError) as error:
        raise typer.BadParameter(message(error), param_hint="SPEC") from error
    if not isinstance(strategy, CalibratedStrategy):
        able = [name for name, cls in registry.strategies().items() if issubclass(cls, CalibratedStrategy)]
        raise typer.BadParameter(
            f"{spec!r} needs no calibration; use it as it is. These can be calibrated: {', '.join(able)}",
            param_hint="SPEC",
        )
    if strategy.calibration is not None or not strategy.learns:
        named = strategy.calibration is not None
        reason = "names a calibration already; leave it out" if named else "is fitted to nothing; use it as it is"
        raise typer.BadParameter(f"{spec!r} {reason}", param_hint="SPEC")
    return strategy


def _vacant(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose calibration would be lost."""
    if not overwrite and any(path.exists() for path in _files(folder)):
        raise typer.BadParameter(
            f"{folder} holds a finished calibration; choose another folder, or replace it with --overwrite",
            param_hint="--out",
        )


def _files(folder: Path) -> tuple[Path, Path]:
    """The files of a finished calibration."""
    from ...core.calibration.artifact import NUMBERS, RECORD

    return folder / RECORD, folder / NUMBERS


@contextmanager
def _window_by_window(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, as the `report` of a calibration. Ctrl-C waits for the window to end; a second one does not."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def report(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)
            if asked:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield report
        finally:
            signal.signal(signal.SIGINT, before)


def _summary(
    strategy: "CalibratedStrategy", evidence: "Evidence", text: str, size: int, out: Path, model: str | None
) -> Iterator[str]:
    """What a calibration took, what it is worth, and how to use it."""
    yield f"saved to {out}: {size:,} bytes"
    yield f"{evidence.windows} windows of {evidence.length} tokens of the text {text} took {evidence.seconds:.1f} s"
    if evidence.perplexity is not None:
        yield (
            f"perplexity {evidence.perplexity_exact:.4f} unquantized, {evidence.perplexity:.4f} through the cache: "
            f"{evidence.heldout_tokens} held-out tokens, each reading packed what a cache that keeps the newest "
            f"{evidence.residual_length} exact has packed by then"
        )
    elif evidence.heldout_tokens:
        yield f"windows of {evidence.length} tokens are too short to read anything packed: no perplexity was measured"
    yield "use it with"
    yield f"  from cachequant import registry; registry.get({strategy.name!r}).from_pretrained({str(out)!r})"
    chosen = [] if model is None else ["--model", model]
    yield f"  {shlex.join(['cachequant', 'bench', *chosen, '--strategies', registry.spec(strategy)])}"


def _writable(folder: Path) -> None:
    """Make the folder, and find out before hours of work whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}", param_hint="--out") from error
