"""`python -m cachequant.benchmarks.lm_eval`: tasks of lm-evaluation-harness through quantized caches."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..environment import Environment, Precision

if TYPE_CHECKING:
    from .evaluation import Score, Scores


def main(
    tasks: Annotated[list[str], typer.Option(help="Files of rows (*.jsonl) or names of the harness's tasks; repeat.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: the bundled reference.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Specs such as uniform:bits=4 or QuantizedCache:nbits=2; repeat. Default: uniform."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="decode, stream or paper: how log-likelihoods are computed.")
    ] = "decode",
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples. Default: the task's own.")] = None,
    residual_length: Annotated[int | None, typer.Option(min=0, help="Newest tokens kept exact.")] = None,
    sink_tokens: Annotated[int | None, typer.Option(min=0, help="First tokens kept exact.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    exact: Annotated[bool, typer.Option(help="Also score the exact cache, DynamicCache.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, predictions included.")] = None,
) -> None:
    """Score tasks through caches, and say how much of what was read was packed."""
    import torch

    from ..contenders import EXACT, Baseline, candidate
    from ..errors import Unusable, message
    from ..subjects import load_model
    from .harness import require_harness

    console = Console()
    try:
        require_harness()
        from .evaluation import evaluate

        specs = [*([EXACT] if exact else []), *(strategy or ["uniform"])]
        sources = {chosen.spec: chosen.build() for chosen in map(candidate, specs)}
        panel, loaded, tokenizer = load_model(model, getattr(torch, dtype.value), device)
        given = {"residual_length": residual_length, "sink_tokens": sink_tokens}
        options = {name: value for name, value in given.items() if value is not None}
        found: dict[str, Scores] = {}
        for spec, source in sources.items():
            baseline = isinstance(source, Baseline)
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", UserWarning)
                found[spec] = evaluate(
                    loaded,
                    tokenizer,
                    _maker(source, residual_length) if baseline else source,
                    tasks,
                    protocol="decode" if baseline else protocol,  # type: ignore[arg-type] (checked there)
                    limit=limit,
                    batch_size=batch_size,
                    fewshot=fewshot,
                    options={} if baseline else options,
                )
            for warning in heard:
                if "exact model" in str(warning.message):
                    console.print(f"[yellow]{escape(spec)}:[/] {escape(str(warning.message))}", highlight=False)
    except Unusable as error:
        raise typer.BadParameter(message(error), param_hint=error.option) from error
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(message(error)) from error
    for table in tables(found):
        console.print(table)
    facts = f"{panel}, {dtype.value}, protocol {protocol}"
    if protocol == "paper":
        facts += " (nothing kept exact, as papers evaluate: no cache works like this)"
    console.print(escape(f"{facts}. {Environment.current(device)}"), style="dim", highlight=False)
    if out is not None:
        lines = ",\n".join(f"{scores.model_dump_json(indent=2)}" for scores in found.values())
        try:
            out.write_text(f"[{lines}]\n", encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error


def tables(found: "dict[str, Scores]") -> Iterator[Table]:
    """One for each task, with a row per cache and a column per metric."""
    columns: dict[str, dict[str, None]] = {}
    for scores in found.values():
        for score in scores.scores:
            columns.setdefault(score.task, {})[score.metric] = None
    for task, metrics in columns.items():
        shown = Table(title=escape(task), box=box.SIMPLE_HEAD, title_justify="left")
        shown.add_column("cache", overflow="fold")
        for heading in (*metrics, "read packed", "bits held"):
            shown.add_column(escape(heading), justify="right")
        for spec, scores in found.items():
            by_metric = {score.metric: _cell(score) for score in scores.scores if score.task == task}
            reading = scores.readings.get(task)
            memory = None if reading is None else reading.memory
            shown.add_row(
                escape(spec),
                *(by_metric.get(metric, "-") for metric in metrics),
                "-" if reading is None else f"{reading.packed_share:.1%}",
                "-" if memory is None else f"{memory.bits_per_element:.2f}",
            )
        yield shown


def _cell(score: "Score") -> str:
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"


def _maker(baseline: Any, residual_length: int | None) -> Any:
    from ..contenders import Exact

    if isinstance(baseline, Exact):
        return None
    # its own default is that of packed caches
    return lambda model: baseline.cache(model, 128 if residual_length is None else residual_length)


if __name__ == "__main__":
    typer.run(main)
