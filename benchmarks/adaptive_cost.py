"""What it costs to decide bits token by token: time per decoded token, and which part of the work takes it.

    python -m cachequant.benchmarks.adaptive_cost --threads 1 --out results

The strategy decodes beside `uniform` of the same bits, turn by turn as in `speed`, through a random model whose queries
are sharpened: were attention flat, no token would need other bits than its neighbours. While it runs, methods of the
cache are wrapped in clocks from here; nothing in the cache knows of them.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from .. import registry
from ..core import AdaptiveStrategy, PackedCache, attach
from ..core.hf.adaptive import AdaptiveLayer
from ..core.hf.blocks import BlockLayer
from ..core.hf.layer import SIDES, PackedLayer
from ..core.hf.masks import Visibility
from ..core.hf.segments import Scoring
from ..core.host import HostCopy
from ..core.pools import RowPools
from ..core.protocol import CacheQuantizer
from .environment import Environment, Precision
from .errors import message
from .held import held_bytes
from .speed import BASELINE, RESIDUAL_LENGTH, Contender, build_model, interleave

NAME = "adaptive-cost"

LENGTHS = "1024,4096,16384"
INTERVALS = "1,8,32,64,128"
SWEPT_LENGTH = 4096
# a whole number of every interval, and a block of `uniform`: the mean over as many is that of any stretch
STEPS = 128

# By how much queries grow. Scores then deviate by about 1.4, and a decision moves about as large a share of the values
# as in the reference model: one in ten among 2000.
SHARPNESS = 7.0

# what the model makes of a normalised state of 512 numbers, whose weights deviate by 0.02
DEVIATION = 0.02 * 512**0.5

# newest queries that a prompt is seen with
QUERIES = 512

WIDTHS = (2, 3, 4, 8)

TABLE_WIDTH = 150

Methods = dict[str, tuple[tuple[type, str], ...]]

PARTS: Methods = {
    "attention": ((AdaptiveLayer, "attend"), (BlockLayer, "attend")),
    "scores": ((AdaptiveLayer, "observe"), (AdaptiveLayer, "_notice"), (AdaptiveLayer, "_keep")),
    "decision": ((AdaptiveLayer, "evidence"), (AdaptiveLayer, "_settled")),
    "re-encoding": ((RowPools, "rebuilt"),),
    "host copy": ((HostCopy, "append"), (HostCopy, "read")),
    "tail": ((PackedLayer, "update"), (AdaptiveLayer, "apply")),
}
"""Whose time makes up a part, without the time of others named here that they call. `decision` contains the strategy's
own methods, `tail` the packing of blocks, and `rest` what is in no part: the model, and all of DynamicCache."""

NAMES = (*PARTS, "rest")


class Cost(BaseModel):
    """One contender at one length; milliseconds of CPU time, all threads, per decoded token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    tokens: int
    """Held before the first step."""
    interval: int | None
    key_bits: float
    """Width of a packed token, mean over tokens and layers after the last step."""
    value_bits: float
    held_bits: float
    """All that is held on the device, per cached number."""
    decisions: int
    """Of each layer, in the steps counted."""
    moved: float
    """Share of the packed keys and values whose width a decision changed, mean."""
    mean_ms: float
    median_ms: float
    worst_ms: float
    wall_mean_ms: float
    ratio: float
    """Of the means, to `uniform` with the same bits."""
    parts: dict[str, float]
    """Mean by part; they add up to `mean_ms`."""


class Report(BaseModel):
    """All figures with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    model: str
    dtype: str
    strategy: str
    steps: int
    lengths: tuple[Cost, ...]
    intervals: tuple[Cost, ...]
    """The strategy with other intervals, at one length."""


@dataclass
class Page:
    """What the clocks saw in one step."""

    parts: dict[str, float]
    decided: int = 0
    """Pools decided about; two per layer."""
    held: int = 0
    """Rows whose width was decided again."""
    moved: int = 0
    """Rows whose width changed."""


class Clocks:
    """CPU milliseconds by part; a part does not contain what its methods call of other parts."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._inner: list[float] = []
        self.turn()

    def turn(self) -> None:
        """Begin a new page."""
        self.page = Page(dict.fromkeys(self._methods, 0.0))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the methods; afterwards they are themselves again, whatever happened."""
        before: list[tuple[type, str, Any]] = []
        try:
            for part, methods in self._methods.items():
                for owner, name in methods:
                    method = getattr(owner, name)
                    before.append((owner, name, vars(owner).get(name)))
                    setattr(owner, name, self._timed(part, self._counted(method) if name == "rebuilt" else method))
            yield
        finally:
            self._inner.clear()
            for owner, name, method in reversed(before):
                if method is None:  # inherited
                    delattr(owner, name)
                else:
                    setattr(owner, name, method)

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent = 1e3 * (time.process_time() - start)
                self.page.parts[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return timed

    def _counted(self, rebuilt: Callable[..., RowPools]) -> Callable[..., RowPools]:
        def counted(pools: RowPools, widths: Tensor, *args: Any, **kwargs: Any) -> RowPools:
            held = pools.widths
            self.page.decided += 1
            self.page.held += held.numel()
            self.page.moved += int((widths[:, : held.shape[1]] != held).sum())
            return rebuilt(pools, widths, *args, **kwargs)

        return counted


def sharpened(model: Any, factor: float = SHARPNESS) -> Any:
    """`model`, its queries `factor` times as large from now on."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
    return model


@torch.inference_mode()
def fill(cache: Any, model: Any, tokens: int) -> None:
    """Give `cache` a prompt of random states like those the model makes, without the forward that would make them.

    Adaptive layers are shown its newest queries, as attention would, so that they decide as after any prompt.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def states(heads: int, count: int, deviation: float) -> Tensor:
        shape = (1, heads, count, config.head_dim)
        return (deviation * torch.randn(shape, generator=generator)).to(model.device, model.dtype)

    queries = min(tokens, QUERIES)
    scoring = Scoring(Visibility(None, queries, tokens, model.device), config.head_dim**-0.5)
    for index in range(config.num_hidden_layers):
        key, value = (states(config.num_key_value_heads, tokens, DEVIATION) for _ in SIDES)
        query = states(config.num_attention_heads, queries, DEVIATION * SHARPNESS)
        handle, _ = cache.update(key, value, index)
        layer = cache.layers[index]
        if isinstance(layer, AdaptiveLayer):
            layer.observe(query, handle, scoring)
            layer.settle()


def widths(cache: Any) -> tuple[float, float]:
    """Mean width of the packed keys and values, over tokens and layers; of all of them where nothing is packed."""
    found: list[tuple[float, ...]] = []
    for layer in cache.layers:
        if isinstance(layer, AdaptiveLayer) and layer.packed_tokens:
            found.append(tuple(layer.pools[side].widths.float().mean().item() for side in SIDES))
        elif isinstance(layer, BlockLayer):
            found.append(tuple(float(getattr(layer.formats, side).bits) for side in SIDES))
        else:
            found.append((8.0 * layer.dtype.itemsize,) * 2)
    key, value = map(statistics.fmean, zip(*found, strict=True))
    return key, value


def equal_bits(key: float, value: float) -> str:
    """The spec of `uniform` with the widths nearest to these."""
    key, value = (min(WIDTHS, key=lambda width, bits=bits: abs(width - bits)) for bits in (key, value))
    return f"uniform:bits={key}" if key == value else f"uniform:key_bits={key},value_bits={value}"


def measure(
    model: Any, adaptive: Sequence[AdaptiveStrategy], tokens: int, steps: int, bracket: bool = True
) -> list[Cost]:
    """Decode `steps` tokens from `tokens` on with the strategies, and `uniform` of the bits that the first of them has.

    bracket: also with DynamicCache, and with the smallest `uniform`.
    """
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    attach(shared)
    packed: dict[str, CacheQuantizer] = {registry.spec(strategy): strategy for strategy in adaptive}
    filled = {name: _filled(_packed(name, shared, strategy), tokens) for name, strategy in packed.items()}
    twin = equal_bits(*widths(filled[registry.spec(adaptive[0])][1]))
    specs = dict.fromkeys([f"uniform:bits={WIDTHS[0]}", twin] if bracket else [twin])
    others = [Contender(BASELINE, model, lambda: DynamicCache(config=model.config))] if bracket else []
    others += [_packed(spec, shared, registry.parse(spec)) for spec in specs]
    filled = {runner.name: _filled(runner, tokens) for runner in others} | filled
    # the same tokens for everyone, another one each time: so queries differ, as those of a text do
    ids = torch.randint(model.config.vocab_size, (steps + 1, 1, 1), generator=torch.Generator().manual_seed(1))
    own = tuple((type(adaptive[0]), name) for name in ("widths", "merge"))
    clocks = Clocks({**PARTS, "decision": PARTS["decision"] + own})
    books: dict[str, list[Page]] = {name: [] for name in filled}
    actions = {
        name: _step(runner, cache, ids.to(model.device), clocks, books[name])
        for name, (runner, cache) in filled.items()
    }
    with clocks.installed():
        times = interleave(actions, steps)
    base = statistics.fmean(cpu for _, cpu in times[twin])
    intervals = {registry.spec(strategy): strategy.interval for strategy in adaptive}
    return [
        _cost(name, cache, tokens, intervals.get(name), times[name], books[name][1:], base)
        for name, (_, cache) in filled.items()
    ]


def run(
    strategy: AdaptiveStrategy,
    lengths: Sequence[int],
    intervals: Sequence[int],
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    swept_length: int = SWEPT_LENGTH,
    tell: Callable[[str], None] = lambda task: None,
) -> Report:
    """Measure the strategy at all lengths, and with all intervals at one; `tell` hears what comes next."""
    model = sharpened(build_model(dtype))
    costs: list[Cost] = []
    for tokens in lengths:
        tell(f"decoding at {tokens} tokens")
        costs += measure(model, [strategy], tokens, steps)
    swept: list[Cost] = []
    if intervals:
        tell(f"intervals at {swept_length} tokens")
        each = [strategy.model_copy(update={"interval": interval}) for interval in intervals]
        swept = measure(model, each, swept_length, steps, bracket=False)
    return Report(
        environment=Environment.current(),
        model=f"Llama, 6 layers, 8 query and 2 kv heads of 128, random weights, queries times {SHARPNESS:g}",
        dtype=str(dtype).removeprefix("torch."),
        strategy=registry.spec(strategy),
        steps=steps,
        lengths=tuple(costs),
        intervals=tuple(swept),
    )


def tables(report: Report) -> list[Table]:
    """For rich: times, and of what they are made."""
    found = []
    for title, headings, rows in _content(report):
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for heading in headings:
            if heading == "cache":
                table.add_column(heading, overflow="fold", min_width=14)
            else:
                table.add_column(heading, justify="right", no_wrap=True)
        for before, row in zip([None, *rows], rows, strict=False):
            if before is not None and before[0] != row[0]:
                table.add_section()
            table.add_row(*map(escape, row))
        found.append(table)
    return found


def markdown(report: Report) -> str:
    """The same tables with the conditions under them."""
    blocks = ["# What deciding bits token by token costs"]
    for title, headings, rows in _content(report):
        marks = ["---" if heading == "cache" else "---:" for heading in headings]
        lines = [headings, marks, *([row[0], f"`{row[1]}`", *row[2:]] for row in rows)]
        blocks += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*blocks, *describe(report)]) + "\n"


def describe(report: Report) -> list[str]:
    """The conditions without which the figures mean nothing."""
    return [
        f"{report.steps} steps of one token; contenders take turns, the first turn is not counted; newest "
        f"{RESIDUAL_LENGTH} tokens exact. Times are the process's CPU time. Ratio: of means, to `uniform` with the "
        "widths nearest to those that the strategy chose for the prompt. Worst: the slowest step, in which all layers "
        "decide, or pack. Bits of keys and values: their widths alone; all: whatever is held on the device, per "
        "number. Moved: share of the packed keys and values whose width a decision changed.",
        "Parts: `attention` over packed rows or blocks and the tail; `scores` kept for the strategy; `decision`: "
        "evidence and widths; `re-encoding` of rows; `host copy`, to and from; `tail`: appending to it and, for "
        "`uniform`, packing blocks; `rest`: the model, and stock attention where the cache is transformers'.",
        f"Strategy: {report.strategy}. Model: {report.model}, {report.dtype}, batch 1, prompts of random states. "
        f"{report.environment}.",
    ]


def main(
    lengths: Annotated[str, typer.Option(help="Tokens held before decoding.")] = LENGTHS,
    interval: Annotated[str, typer.Option(help="Intervals to compare at one length; empty: none.")] = INTERVALS,
    strategy: Annotated[str, typer.Option(help="Spec of a strategy with widths per token.")] = "qaq",
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded at each length.")] = STEPS,
    swept_length: Annotated[int, typer.Option(min=1, help="Tokens held where intervals are compared.")] = SWEPT_LENGTH,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.float32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"Folder for {NAME}.json and .md.")] = None,
) -> None:
    """Time decoding with bits decided token by token against uniform bits, and say what takes the time."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        parsed = registry.parse(strategy)
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(message(error), param_hint="--strategy") from error
    if not isinstance(parsed, AdaptiveStrategy):
        raise typer.BadParameter(
            f"{strategy!r} decides nothing while decoding; time it with `python -m cachequant.benchmarks.speed`",
            param_hint="--strategy",
        )
    asked = _numbers(lengths, "--lengths"), _numbers(interval, "--interval")
    with console.status("building the model") as status:
        report = run(parsed, *asked, getattr(torch, dtype.value), steps, swept_length, tell=status.update)
    for table in tables(report):
        # a narrow terminal wraps lines, rather than that columns are lost
        Console(width=max(console.width, TABLE_WIDTH)).print(table)
    for line in describe(report):
        console.print(line, markup=False, highlight=False)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{NAME}.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (out / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write to {out}: {error.strerror}", param_hint="--out") from error


def _packed(name: str, model: Any, strategy: CacheQuantizer) -> Contender:
    return Contender(name, model, lambda: PackedCache(model, strategy, residual_length=RESIDUAL_LENGTH))


def _filled(runner: Contender, tokens: int) -> tuple[Contender, Any]:
    cache = runner.new_cache()
    fill(cache, runner.model, tokens)
    return runner, cache


def _step(runner: Contender, cache: Any, ids: Tensor, clocks: Clocks, book: list[Page]) -> Callable[[], None]:
    def step() -> None:
        clocks.turn()
        runner.forward(ids[len(book)], cache)
        book.append(clocks.page)

    return step


def _cost(
    name: str,
    cache: Any,
    tokens: int,
    interval: int | None,
    times: list[tuple[float, float]],
    book: list[Page],
    base: float,
) -> Cost:
    wall, cpu = zip(*times, strict=True)
    mean = statistics.fmean(cpu)
    parts = {part: statistics.fmean(page.parts[part] for page in book) for part in PARTS}
    key, value = widths(cache)
    held = sum(page.held for page in book)
    return Cost(
        contender=name,
        tokens=tokens,
        interval=interval,
        key_bits=key,
        value_bits=value,
        held_bits=_held_bits(cache),
        decisions=sum(page.decided for page in book) // (2 * len(cache.layers)),
        moved=sum(page.moved for page in book) / held if held else 0.0,
        mean_ms=mean,
        median_ms=statistics.median(cpu),
        worst_ms=max(cpu),
        wall_mean_ms=statistics.fmean(wall),
        ratio=mean / base,
        parts={**parts, "rest": mean - sum(parts.values())},
    )


def _held_bits(cache: Any) -> float:
    if isinstance(cache, PackedCache):
        return cache.memory().bits_per_element
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return 8 * held_bytes(cache) / numbers


Content = tuple[str, list[str], list[list[str]]]


def _content(report: Report) -> Iterator[Content]:
    """Title, headings and rows of every table; rows begin with tokens and cache."""
    totals = ["key bits", "value bits", "all", "moved", "mean", "ratio", "median", "worst"]
    yield (
        "CPU milliseconds per decoded token",
        ["tokens", "cache", *totals],
        [
            [
                *_names(cost),
                f"{cost.key_bits:.2f}",
                f"{cost.value_bits:.2f}",
                f"{cost.held_bits:.2f}",
                f"{cost.moved:.1%}" if cost.decisions else "-",
                f"{cost.mean_ms:.1f}",
                f"{cost.ratio:.2f}",
                f"{cost.median_ms:.1f}",
                f"{cost.worst_ms:.1f}",
            ]
            for cost in report.lengths
        ],
    )
    yield "The mean, part by part", ["tokens", "cache", *NAMES], [[*_names(c), *_parts(c)] for c in report.lengths]
    if report.intervals:
        rows = [
            [
                *_names(cost),
                str(cost.interval or "-"),
                f"{cost.moved:.1%}" if cost.decisions else "-",
                f"{cost.mean_ms:.1f}",
                f"{cost.ratio:.2f}",
                f"{cost.worst_ms:.1f}",
                *_parts(cost),
            ]
            for cost in report.intervals
        ]
        yield "Other intervals", ["tokens", "cache", "interval", "moved", "mean", "ratio", "worst", *NAMES], rows


def _names(cost: Cost) -> list[str]:
    return [str(cost.tokens), cost.contender]


def _parts(cost: Cost) -> list[str]:
    return [f"{cost.parts[part]:.2f}" if cost.parts[part] else "-" for part in NAMES]


def _numbers(text: str, option: str) -> list[int]:
    words: Iterable[str] = (word for word in text.split(",") if word.strip())
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers from 1 on; write 1024,4096", param_hint=option)
    return numbers


if __name__ == "__main__":
    typer.run(main)
