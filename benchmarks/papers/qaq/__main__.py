"""The claims of QAQ (https://arxiv.org/abs/2403.04643), measured on a model and its outlier twin.

    python -m cachequant.benchmarks.papers.qaq --out FOLDER

answers three questions: what outliers, the attention window and bits of their own for keys and values are worth at
equal divergence; how much more QAQ compresses than dropping tokens does; and what the paper's accounting leaves out.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ....core import MemoryReport
from ... import contenders, leaderboard
from ...environment import Precision
from ...errors import Unusable, message
from ...leaderboard import Leaderboard, Subject, prepare
from ...metrics import Accuracy
from ...streaming import ExactRun
from . import report
from .figures import Geometry, Paper, load
from .results import DIVERGENCES, KEEPS, TARGETS, Result, line, plan

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


class WeighedRun(ExactRun):
    """The same exact run, which keeps the memory report of the cache that was compared last."""

    def __init__(self, run: ExactRun) -> None:
        # what it has computed is shared, not computed again
        vars(self).update(vars(run))
        self.report: MemoryReport | None = None

    def compare(self, model: Any, cache: Any) -> Accuracy:
        """As always."""
        self.report = None
        accuracy = super().compare(model, cache)
        self.report = cache.memory()
        return accuracy


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for qaq-paper-MODEL.md, .json and .png.")] = Path(
        "cachequant-papers"
    ),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of text, evaluated as one batch.")] = 6,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default: 1056, or what the model takes.")
    ] = None,
    twin: Annotated[bool, typer.Option(help="Also measure the model's twin with outlier key channels.")] = True,
    targets: Annotated[
        list[str] | None, typer.Option(help="Values of sigma_key; repeat, or separate by ','. Default: 0.0005 to 0.1.")
    ] = None,
    keeps: Annotated[
        list[str] | None, typer.Option(help="Shares that evictions keep; repeat, or separate by ','. Default: 0.9-0.1.")
    ] = None,
    divergences: Annotated[
        list[str] | None, typer.Option(help="Mean KL at which to compare sizes. Default: 0.01,0.03,0.1,0.3.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Dtype of the model.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Measure QAQ's ablations, its compression against dropping tokens, and its accounting."""
    import torch

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    paper = load()
    at = _numbers(divergences, DIVERGENCES, "--divergences")
    try:
        curves = plan(_numbers(targets, TARGETS, "--targets"), _numbers(keeps, KEEPS, "--keeps"))
    except ValueError as error:
        raise typer.BadParameter(message(error), param_hint="--targets / --keeps") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        board, subjects = prepare(
            model,
            text,
            windows=windows,
            window_length=length,
            dtype=getattr(torch, dtype.value),
            device=device,
            twin=twin,
        )
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {out}: {error.strerror}", param_hint="--out") from error
    name = f"qaq-paper-{board.models[0].panel.replace('/', '--')}"
    result = _measure(console, paper, board, subjects, curves, at, out, name)
    for verdict in report.verdicts(result, paper):
        console.print(escape(verdict), highlight=False)
    for failure in report.failures(result):
        console.print(f"[red]no figure:[/] {escape(failure)}", highlight=False)
    console.print(f"wrote {name}.md, {name}.json, {name}.png to {escape(str(out))}", highlight=False)


def shape_of(model: Any) -> Geometry:
    """Of the keys that a model caches."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(layers=config.num_hidden_layers, channels=heads * size, heads=heads)


def _measure(
    console: Console,
    paper: Paper,
    board: Leaderboard,
    subjects: list[Subject],
    curves: dict[str, dict[str, str]],
    divergences: tuple[float, ...],
    out: Path,
    name: str,
) -> Result:
    """All rows, curve by curve, written out as they come."""
    runs = [WeighedRun(subject.exact) for subject in subjects]
    weighed = [Subject(subject.panel, run) for subject, run in zip(subjects, runs, strict=True)]
    result = Result(
        title=paper.title,
        source=paper.source,
        board=board,
        shapes={subject.panel.card.panel: shape_of(subject.panel.model) for subject in subjects},
        divergences=divergences,
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(subjects) * sum(map(len, curves.values())))
            for curve, setting, spec in _flat(curves):
                candidate = contenders.candidates([spec])[0]
                progress.update(task, description=escape(spec))
                for subject, run in zip(weighed, runs, strict=True):
                    row = leaderboard.measure(subject, candidate)
                    shape = result.shapes[subject.panel.card.panel]
                    result = result.with_line(line(curve, setting, row, run.report, shape))
                    report.write(result, paper, out, name)
                    progress.update(task, advance=1)
    finally:
        # an interrupted run keeps what it has
        report.draw(result, out / f"{name}.png")
    return result


def _flat(curves: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(curve, setting, spec) for curve, specs in curves.items() for setting, spec in specs.items()]


def _numbers(texts: list[str] | None, default: tuple[float, ...], option: str) -> tuple[float, ...]:
    """Each once, in their order."""
    parts = [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
    try:
        found = tuple(dict.fromkeys(map(float, parts)))
    except ValueError as error:
        raise typer.BadParameter(f"{error}; write numbers like {default[0]:g}", param_hint=option) from error
    if any(not number > 0 for number in found):
        raise typer.BadParameter("numbers have to be greater than 0", param_hint=option)
    return found or default


if __name__ == "__main__":
    app()
