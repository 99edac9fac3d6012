"""How fast a packed cache is and how much it holds, beside transformers' own caches in the same run.

    python -m cachequant.benchmarks.speed --quick

Contenders take turns step by step, so that whatever else the machine does falls on all of them; figures are medians,
and comparisons are made within a turn. The weights are random: neither time nor bytes depend on their values.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.utils.import_utils import is_optimum_quanto_available

from .. import registry
from ..core import LayerSpec, MixedFormat, PackedCache, attach
from .environment import Environment, Precision
from .held import held_bytes

BASELINE = "DynamicCache"
QUANTO = "QuantizedCache quanto 4-bit"
RESIDUAL_LENGTH = 128

CONTEXT = 4096
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
# every contender packs, or re-quantizes, once in 128 steps: a mean over as many holds one such step
DECODE_STEPS = 128
SWEEP_STEPS = 12
PREFILL_TOKENS = 2048
PREFILL_ROUNDS = 5


class Timing(BaseModel):
    """One contender at one task; milliseconds per forward pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """decode: one token. prefill: `tokens` tokens into an empty cache."""
    contender: str
    tokens: int
    """Context length before the first step, or tokens prefilled."""
    rounds: int
    wall_ms: float
    """Median."""
    wall_mean_ms: float
    cpu_ms: float
    """Median of the process's CPU time, all threads."""
    cpu_mean_ms: float
    wall_ratio: float
    """Median over the rounds of this contender's time by DynamicCache's in the same round."""
    cpu_ratio: float


class Held(BaseModel):
    """Bytes one contender holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    tokens: int
    bytes: int
    ratio: float
    """How many times smaller than DynamicCache."""


class SpeedReport(BaseModel):
    """All figures with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    model: str
    parameters: int
    dtype: str
    batch: int
    held: tuple[Held, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class Contender:
    """A cache and the model it is used with."""

    name: str
    model: Any
    new_cache: Callable[[], Cache]

    def filled(self, tokens: int) -> Cache:
        """A cache that holds `tokens` random tokens, without the forward pass that would make them."""
        config = self.model.config
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        generator = torch.Generator().manual_seed(0)
        key, value = (torch.randn(shape, generator=generator).to(self.model.device, self.model.dtype) for _ in "kv")
        cache = self.new_cache()
        for layer in range(config.num_hidden_layers):
            cache.update(key.clone(), value.clone(), layer)
        return cache

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache) -> None:
        """One pass over `ids [1, tokens]`, finished when it returns."""
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def build_model(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """A Llama with the head size and the ratio of query to kv heads of large ones, and about 15M random weights."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.to(device, dtype).eval()


def contenders(model: Any, specs: Sequence[str]) -> list[Contender]:
    """DynamicCache first, transformers' QuantizedCache if its backend is installed, then a PackedCache per spec.

    The packed caches get a copy of `model` that shares its weights, so that nothing of ours slows the others down.

    Raises what `registry.parse` raises, and ValueError for strategies that keep keys before RoPE.
    """
    found = [Contender(BASELINE, model, lambda: DynamicCache(config=model.config))]
    if is_optimum_quanto_available():
        found.append(Contender(QUANTO, model, lambda: _quanto(model)))
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    attach(shared)
    for spec in specs:
        strategy = registry.parse(spec)
        _require_fillable(strategy, model.config)
        found.append(Contender(f"PackedCache {registry.spec(strategy)}", shared, _packed(shared, strategy)))
    return found


def measure_held(runners: Sequence[Contender], tokens: int) -> list[Held]:
    """Bytes after `tokens` tokens."""
    sizes = {runner.name: held_bytes(runner.filled(tokens)) for runner in runners}
    return [
        Held(contender=name, tokens=tokens, bytes=size, ratio=sizes[BASELINE] / size) for name, size in sizes.items()
    ]


def measure_decode(runners: Sequence[Contender], context: int, steps: int) -> list[Timing]:
    """One token at a time, from `context` tokens on."""
    caches = {runner.name: runner.filled(context) for runner in runners}
    ids = torch.tensor([[7]], device=runners[0].model.device)
    actions = {runner.name: _step(runner, ids, caches[runner.name]) for runner in runners}
    return _timings("decode", context, interleave(actions, steps))


def measure_prefill(runners: Sequence[Contender], tokens: int, rounds: int) -> list[Timing]:
    """`tokens` tokens in one pass into an empty cache."""
    ids = torch.arange(tokens, device=runners[0].model.device).remainder(2048)[None]
    actions = {runner.name: _prefill(runner, ids) for runner in runners}
    return _timings("prefill", tokens, interleave(actions, rounds))


def interleave(
    actions: dict[str, Callable[[], None]], rounds: int, before: Mapping[str, Callable[[], None]] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) milliseconds per round of each action; the actions alternate, after one round that is not counted.

    before: done ahead of the action of that name, untimed.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for counted in [False] + [True] * rounds:
        for name, action in actions.items():
            if before is not None:
                before[name]()
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            if counted:
                times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return times


def run(
    specs: Sequence[str] = ("uniform",),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    quick: bool = False,
    tell: Callable[[str], None] = lambda task: None,
) -> SpeedReport:
    """Measure everything; `tell` hears what comes next. `quick` takes shorter contexts and fewer rounds."""
    model = build_model(dtype, device)
    runners = contenders(model, specs)
    part = 4 if quick else 1
    tell(f"bytes at {CONTEXT} tokens")
    held = measure_held(runners, CONTEXT)
    timings: list[Timing] = []
    tell(f"prefill of {PREFILL_TOKENS // part} tokens")
    timings += measure_prefill(runners, PREFILL_TOKENS // part, 3 if quick else PREFILL_ROUNDS)
    for context in CONTEXTS[: -2 if quick else None]:
        tell(f"decoding at {context} tokens")
        steps = DECODE_STEPS // part if context == CONTEXT else SWEEP_STEPS
        timings += measure_decode(runners, context, steps)
    return SpeedReport(
        environment=Environment.current(str(model.device)),
        model="Llama, 6 layers, 8 query and 2 kv heads of 128, random weights",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        batch=1,
        held=tuple(held),
        timings=tuple(timings),
    )


def tables(report: SpeedReport) -> list[Table]:
    """For rich: bytes, and times."""
    held = Table(title=f"Bytes held after {report.held[0].tokens} tokens", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("cache", "bytes", "smaller"):
        held.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in report.held:
        held.add_row(escape(row.contender), f"{row.bytes:,}", f"{row.ratio:.2f}x")
    timed = Table(
        title="Milliseconds per forward pass (ratios: to DynamicCache, round by round)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption=escape(
            f"{report.model}, {report.parameters / 1e6:.1f}M parameters, {report.dtype}, batch 1. {report.environment}."
        ),
        caption_justify="left",
    )
    for heading in (
        "task",
        "tokens",
        "cache",
        "rounds",
        "median",
        "mean",
        "ratio",
        "CPU median",
        "CPU mean",
        "CPU ratio",
    ):
        timed.add_column(heading, justify="left" if heading in ("task", "cache") else "right")
    before = None
    for row in report.timings:
        if before is not None and before != (row.task, row.tokens):
            timed.add_section()
        before = (row.task, row.tokens)
        walls = (f"{row.wall_ms:.1f}", f"{row.wall_mean_ms:.1f}", f"{row.wall_ratio:.2f}")
        cpus = (f"{row.cpu_ms:.1f}", f"{row.cpu_mean_ms:.1f}", f"{row.cpu_ratio:.2f}")
        timed.add_row(row.task, str(row.tokens), escape(row.contender), str(row.rounds), *walls, *cpus)
    return [held, timed]


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    strategies: Annotated[list[str] | None, typer.Option(help="Specs to time; repeat. Default: uniform.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Dtype of model and exact cache.")] = Precision.bfloat16,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Shorter contexts, fewer rounds.")] = False,
) -> None:
    """Time decoding and prefill, and count bytes, against transformers' own caches."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        with console.status("building the model") as status:
            report = run(
                strategies or ("uniform",), getattr(torch, dtype.value), device, quick=quick, tell=status.update
            )
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error
    for table in tables(report):
        console.print(table)
    if not is_optimum_quanto_available():
        console.print("[yellow]note:[/] optimum-quanto is not installed; transformers' QuantizedCache was left out")
    if out is not None:
        try:
            out.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error


def _packed(model: Any, strategy: Any) -> Callable[[], PackedCache]:
    return lambda: PackedCache(model, strategy, residual_length=RESIDUAL_LENGTH)


def _quanto(model: Any) -> QuantizedCache:
    return QuantizedCache("quanto", model.config, nbits=4, residual_length=RESIDUAL_LENGTH)


def _require_fillable(strategy: Any, config: Any) -> None:
    heads, dim = config.num_key_value_heads, config.head_dim
    formats = strategy.formats(LayerSpec(0, config.num_hidden_layers, heads, dim, dim))
    if isinstance(formats, MixedFormat):
        raise ValueError(
            f"{registry.spec(strategy)!r} decides widths by attention, which only forward passes show; time it with "
            "python -m cachequant.benchmarks.adaptive_cost"
        )
    if formats is not None and formats.key.rope == "pre":
        raise ValueError(
            f"{registry.spec(strategy)!r} stores keys before RoPE, which only forward passes can fill a cache with; "
            "time a strategy that stores keys after RoPE"
        )


def _step(runner: Contender, ids: Tensor, cache: Cache) -> Callable[[], None]:
    return lambda: runner.forward(ids, cache)


def _prefill(runner: Contender, ids: Tensor) -> Callable[[], None]:
    return lambda: runner.forward(ids, runner.new_cache())


def _timings(task: str, tokens: int, times: dict[str, list[tuple[float, float]]]) -> list[Timing]:
    base = times[BASELINE]
    return [
        Timing(
            task=task,
            contender=name,
            tokens=tokens,
            rounds=len(rounds),
            wall_ms=statistics.median(wall for wall, _ in rounds),
            wall_mean_ms=statistics.fmean(wall for wall, _ in rounds),
            cpu_ms=statistics.median(cpu for _, cpu in rounds),
            cpu_mean_ms=statistics.fmean(cpu for _, cpu in rounds),
            wall_ratio=statistics.median(mine[0] / theirs[0] for mine, theirs in zip(rounds, base, strict=True)),
            cpu_ratio=statistics.median(mine[1] / theirs[1] for mine, theirs in zip(rounds, base, strict=True)),
        )
        for name, rounds in times.items()
    ]


if __name__ == "__main__":
    typer.run(main)
