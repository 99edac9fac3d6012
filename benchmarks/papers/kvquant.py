"""The perplexity tables of KVQuant (https://arxiv.org/abs/2401.18079), measured again by its own protocol.

    python -m cachequant.benchmarks.papers.kvquant --model PATH --paper-model LLaMA-7B \\
        --text wikitext2_test.txt --calibration-text wikitext2_train.txt

puts our figures beside the paper's. The paper joins the rows of Wikitext-2-raw by blank lines, reads its test part and
calibrates on its training part. Without `--paper-model` only the order of the rows is compared.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..calibration import SAMPLES, Calibrator
from ..environment import Environment, Precision
from ..errors import Unusable
from ..subjects import ModelCard, context_of, load_model, read_text
from . import report
from .figures import Paper, load
from .reproduce import (
    Plan,
    Protocol,
    Reproduction,
    StreamText,
    choose,
    consecutive,
    orderings,
    run,
    stream_of,
    text_card,
)

NAME = "kvquant"
LENGTH = 2048

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for kvquant-paper-MODEL.md and .json.")] = Path("cachequant-papers"),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    paper_model: Annotated[
        str | None, typer.Option(help="Which model of the paper it is, such as LLaMA-7B. Default: none of them.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out standard library.")] = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to calibrate on. Default: the rest of the standard library.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window. Default: the paper's, or 2048 if the model takes them."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows to measure. Default: the whole text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows to calibrate on.")] = SAMPLES,
    tables: Annotated[
        list[str] | None,
        typer.Option(help="Numbers of the paper's tables, or all; repeat, or separate by ','. Default: 18."),
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="Rows such as nuq3-1%; repeat, or separate by ','. Default: all.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Dtype of the model; the paper's is float16.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Measure the rows of KVQuant's tables, the paper's figures beside ours."""
    import torch

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    paper = load(NAME)
    try:
        plan = choose(paper, _split(tables), _split(rows))
        if paper_model is not None and paper_model not in paper.models:
            raise Unusable(f"no figures of {paper_model!r}; there are {', '.join(paper.models)}", "--paper-model")
        out.mkdir(parents=True, exist_ok=True)
        loaded = load_model(model, getattr(torch, dtype.value), device)
        length = _length(paper, paper_model, length, context_of(loaded[1]))
        result, windows_read, learned = _prepare(
            paper, paper_model, loaded, text, calibration_text, length, windows, samples
        )
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {out}: {error.strerror}", param_hint="--out") from error
    name = f"{NAME}-paper-{result.model.panel.replace('/', '--')}"
    result = _measure(console, paper, plan, result, loaded[1], windows_read, learned, out, name)
    for number in dict.fromkeys(line.table for line in result.lines):
        title = next(f"Table {table.number}: {table.title}" for table in paper.tables if table.number == number)
        console.print(report.terminal_table(result, title, number))
        console.print(escape(report.orderings_text(result.orderings, number)), style="dim", highlight=False)
    for paragraph in report.describe(result):
        console.print(escape(paragraph), style="dim", highlight=False)
    for line in result.lines:
        if line.ours.error:
            console.print(f"[red]no figure:[/] {escape(f'{line.row}: {line.ours.error}')}", highlight=False)
    console.print(f"wrote {name}.md, {name}.json to {escape(str(out))}", highlight=False)


def _length(paper: Paper, paper_model: str | None, length: int | None, context: int) -> int:
    theirs = paper.models[paper_model].length if paper_model else LENGTH
    if length is None:
        length = theirs if paper_model else min(theirs, context)
    if length > context:
        raise Unusable(f"windows of {length} tokens are beyond the model's context of {context}", "--length")
    return length


def _prepare(
    paper: Paper,
    paper_model: str | None,
    loaded: tuple[str, Any, Any],
    text: Path | None,
    calibration_text: Path | None,
    length: int,
    limit: int | None,
    samples: int,
) -> tuple[Reproduction, Any, StreamText]:
    """A reproduction without rows, the windows to measure on, and the text to calibrate on."""
    panel, model, tokenizer = loaded
    name, content = read_text(text, "heldout", "--text")
    other, learned = read_text(calibration_text, "train", "--calibration-text")
    if learned == content:
        raise Unusable(f"{other} is the text that is measured; calibrate on another", "--calibration-text")
    ids, learned_ids = stream_of(tokenizer, content), stream_of(tokenizer, learned)
    cut = consecutive(ids, length, limit)
    notes = []
    if paper_model and length != paper.models[paper_model].length:
        notes.append(
            f"The paper's windows of {paper_model} have {paper.models[paper_model].length} tokens, not {length}."
        )
    result = Reproduction(
        title=paper.title,
        source=paper.source,
        differences=paper.differences,
        paper_model=paper_model,
        model=ModelCard(
            panel=panel,
            architecture=type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=model.config.get_text_config(decoder=True).num_hidden_layers,
            context=context_of(model),
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        protocol=Protocol(length=length, windows=len(cut), samples=samples),
        text=text_card(name, content, ids),
        calibration_text=text_card(other, learned, learned_ids),
        environment=Environment.current(str(model.device)),
        notes=tuple(notes),
    )
    return result, cut, StreamText(other, learned, learned_ids, length, samples)


def _measure(
    console: Console,
    paper: Paper,
    plan: Plan,
    result: Reproduction,
    model: Any,
    windows: Any,
    learned: StreamText,
    out: Path,
    name: str,
) -> Reproduction:
    """`result` with its rows, written out as they come."""
    calibrator = Calibrator(model, learned)
    specs = {row.spec for _, row in plan if row.spec}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(specs) * len(windows))
        begun = 0

        def begin(spec: str) -> None:
            nonlocal begun
            # a strategy that failed left windows out
            progress.update(task, completed=begun * len(windows), description=escape(spec))
            begun += 1

        def calibrating(step: str, done: int, total: int) -> None:
            progress.update(task, description=f"calibrating, {step}: {done} of {total}")

        calibrator.report = calibrating
        for line in run(
            model, windows, plan, result.paper_model, calibrator, begin, lambda: progress.update(task, advance=1)
        ):
            lines = (*result.lines, line)
            result = result.model_copy(update={"lines": lines, "orderings": orderings(paper, lines)})
            report.write(result, paper, out, name)
    return result


def _split(names: list[str] | None) -> list[str]:
    return [name.strip() for text in names or () for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    app()
