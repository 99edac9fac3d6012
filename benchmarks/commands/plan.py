"""`cachequant plan`: which context fits, before anything is loaded."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..environment import Precision

if TYPE_CHECKING:
    from rich.console import Console

    from ...core import CacheQuantizer

T = TypeVar("T")


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder with config.json, hub name, or a known shape such as llama-7b. Default: the bundled reference."
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="Of one device: 80GB is 80e9 bytes, 80GiB is 80 * 2**30.")] = "80GB",
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many such devices share the model. Default: --tp.")
    ] = None,
    tp: Annotated[
        int, typer.Option(min=1, help="Devices that share the heads of each layer; others take turns layer by layer.")
    ] = 1,
    reserve: Annotated[
        str, typer.Option(help="Left free on each device for activations and fragments: a share, a size, or 0.")
    ] = "10%",
    weights: Annotated[str | None, typer.Option(help="Size of all weights. Default: parameters in --dtype.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Give figures for so many tokens (131072, 128K, 1M) instead of the longest.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the weights and exact tokens. Default: the config's, or bfloat16.")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="Specs such as uniform:bits=4; repeat, or separate by ';'; all: every variant installed. "
            "Default: one of each kind and width."
        ),
    ] = None,
    residual_length: Annotated[
        int | None, typer.Option(min=0, help="Newest tokens kept exact. Default: 128, or the strategy's.")
    ] = None,
    sink_tokens: Annotated[
        int | None, typer.Option(min=0, max=128, help="First tokens kept exact. Default: 0, or the strategy's.")
    ] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers left exact, separated by commas; -1 is the last.")
    ] = None,
    average_bits: Annotated[
        list[float] | None,
        typer.Option(help="Bits per token to assume, beside the bounds, where they are decided by what is read."),
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Rows of the batch begin at different tokens (left padding).")
    ] = False,
    kernels: Annotated[
        bool, typer.Option(help="Count the indices that Triton's kernels read; they serve NVIDIA GPUs.")
    ] = True,
    paper: Annotated[
        str | None, typer.Option(help="Instead: a paper's table of cache sizes beside ours; kvquant has one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say which contexts fit a device beside the weights, and what takes the memory, without loading a model."""
    from pydantic import ValidationError
    from rich.console import Console
    from rich.markup import escape

    from ..errors import Unusable, message
    from ..plan import tables
    from ..plan.formula import Setting
    from ..plan.planning import Budget, make_plan
    from ..plan.shapes import read_config, shape_of
    from ..plan.sizes import parse_count, parse_reserve, parse_size

    console = Console()
    if paper is not None:
        _paper(console, paper, as_json)
        return
    if devices is not None and devices % tp:
        raise typer.BadParameter(
            f"{devices} devices are no multiple of --tp {tp}, in whose groups they share heads", param_hint="--devices"
        )
    size = _read(parse_size, memory, "--memory")
    reserved = _read(lambda text: parse_reserve(text, size), reserve, "--reserve")
    if reserved >= size:
        raise typer.BadParameter(f"{reserve} of {memory} leaves nothing", param_hint="--reserve")
    tokens = None if context is None else _read(parse_count, context, "--context")
    given = None if weights is None else _read(parse_size, weights, "--weights")
    skipped = None if skip_layers is None else _read(_indices, skip_layers, "--skip-layers")
    chosen = _strategies(strategies)
    setting = Setting(
        batch=batch,
        residual_length=residual_length,
        sink_tokens=sink_tokens,
        skip_layers=skipped,
        tensor_parallel=tp,
        stages=(devices or tp) // tp,
        padded=padded,
        kernels=kernels,
    )
    try:
        name, config = read_config(model)
        shape = shape_of(name, config, None if dtype is None else dtype.value)
        budget = Budget(memory=size, reserve=reserved, weights=shape.weights if given is None else given)
        made = make_plan(shape, chosen, setting, budget, tokens, average_bits or (4,))
    except Unusable as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    except ValidationError as error:
        raise typer.BadParameter(message(error)) from error
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
        return
    for line in tables.header(made):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(tables.contexts(made))
    console.print(tables.parts(made))
    for line in tables.footer(made):
        console.print(escape(line), highlight=False, style="dim")


def _read(parse: Callable[[str], T], text: str, option: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"cannot read {text!r} as layers; write their numbers with commas between, as 0,1,-1"
        ) from error


def _strategies(specs: list[str] | None) -> "list[CacheQuantizer]":
    """The strategies of specs, of all variants installed, or of the default."""
    from ... import registry
    from ..errors import message
    from ..plan.planning import DEFAULT_STRATEGIES

    texts = [spec.strip() for text in specs or () for spec in text.split(";") if spec.strip()]
    try:
        if texts == ["all"]:
            return [cls(**settings) for cls in registry.strategies().values() for settings in cls.variants]
        return [registry.parse(text) for text in texts or DEFAULT_STRATEGIES]
    except (LookupError, ValueError, OSError) as error:
        raise typer.BadParameter(message(error), param_hint="--strategies") from error


def _paper(console: "Console", name: str, as_json: bool) -> None:
    """A paper's sizes beside ours."""
    from rich.markup import escape

    from ..plan import paper_tables
    from ..plan.paper import PAPERS, compare

    if name not in PAPERS:
        raise typer.BadParameter(f"no table of {name!r}; there is one of {', '.join(PAPERS)}", param_hint="--paper")
    compared = compare(name)
    if as_json:
        typer.echo(compared.model_dump_json(indent=2))
        return
    for part in paper_tables.render(compared):
        console.print(escape(part) if isinstance(part, str) else part, highlight=False, soft_wrap=isinstance(part, str))
