"""How fast one layer decodes from packed bytes on a CPU, beside SDPA over the same tokens unquantized.

    python -m cachequant.benchmarks.attention_speed

SDPA gets the query heads that share a kv head as rows of one query, without a mask: several times faster than repeating
keys, which is what transformers does. Contenders take turns; ratios are medians over the rounds.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from .. import registry
from ..core import PackedCache
from ..core.hf.masks import Visibility
from ..core.hf.segments import Scoring
from .environment import Environment, Precision
from .speed import RESIDUAL_LENGTH, interleave

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
CONTEXTS = (4096, 16384)
ROUNDS = 60
SPECS = tuple(f"uniform:bits={bits}" for bits in (8, 4, 3, 2))


class Timing(BaseModel):
    """One contender at one context; milliseconds per decoded token of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    tokens: int
    wall_ms: float
    """Median."""
    cpu_ms: float
    """Median of the process's CPU time, all threads."""
    wall_ratio: float
    """Median over the rounds of this contender's time by SDPA's in the same dtype and round."""
    cpu_ratio: float


class AttentionReport(BaseModel):
    """All figures with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    layer: str
    dtype: str
    rounds: int
    timings: tuple[Timing, ...]


def actions(specs: Sequence[str], tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What decodes one token over `tokens` random ones, by name: SDPA in `dtype` and in float32, then each spec.

    Raises what `registry.parse` raises.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, KV_HEADS, tokens, HEAD_DIM)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, generator=generator).to(dtype)
    exact = {_sdpa(dtype): (query, key, value), _sdpa(torch.float32): (query.float(), key.float(), value.float())}
    found: dict[str, Callable[[], Any]] = {name: _folded(*states) for name, states in exact.items()}
    model = _one_layer(dtype)
    for spec in specs:
        cache = PackedCache(model, registry.parse(spec), residual_length=RESIDUAL_LENGTH)
        cache.update(key[:, :, :-1], value[:, :, :-1], 0)
        # what a forward packs is read from the next one on
        handles = cache.update(key[:, :, -1:], value[:, :, -1:], 0)
        found[spec] = _packed(query, *handles)
    return found


def run(
    specs: Sequence[str] = SPECS,
    dtype: torch.dtype = torch.bfloat16,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    tell: Callable[[str], None] = lambda task: None,
) -> AttentionReport:
    """Measure all contenders at all contexts; `tell` hears what comes next."""
    timings = []
    for tokens in contexts:
        tell(f"attention over {tokens} tokens")
        with torch.inference_mode():
            times = interleave(actions(specs, tokens, dtype), rounds)
        base = times[_sdpa(dtype)]
        for name, mine in times.items():
            ratios = [(a[0] / b[0], a[1] / b[1]) for a, b in zip(mine, base, strict=True)]
            medians = [statistics.median(column) for column in (*zip(*mine, strict=True), *zip(*ratios, strict=True))]
            fields = dict(zip(("wall_ms", "cpu_ms", "wall_ratio", "cpu_ratio"), medians, strict=True))
            timings.append(Timing(contender=name, tokens=tokens, **fields))
    return AttentionReport(
        environment=Environment.current(),
        layer=f"one query, {QUERY_HEADS} query and {KV_HEADS} kv heads of {HEAD_DIM}, batch 1",
        dtype=str(dtype).removeprefix("torch."),
        rounds=rounds,
        timings=tuple(timings),
    )


def table(report: AttentionReport) -> Table:
    """For rich."""
    made = Table(
        title=f"Milliseconds per token and layer (ratios: to SDPA in {report.dtype}, round by round)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption=escape(f"{report.layer}, medians of {report.rounds}. {report.environment}."),
        caption_justify="left",
    )
    for heading in ("tokens", "contender", "wall", "ratio", "CPU", "CPU ratio"):
        made.add_column(heading, justify="left" if heading == "contender" else "right")
    for row in report.timings:
        numbers = (f"{row.wall_ms:.2f}", f"{row.wall_ratio:.2f}", f"{row.cpu_ms:.2f}", f"{row.cpu_ratio:.2f}")
        made.add_row(str(row.tokens), escape(row.contender), *numbers)
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    strategies: Annotated[list[str] | None, typer.Option(help="Specs to time; repeat. Default: 8 to 2 bits.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Dtype of query and exact tokens.")] = Precision.bfloat16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which each contender has one turn.")] = ROUNDS,
) -> None:
    """Time attention of one decoded token over packed bytes, against SDPA."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        with console.status("packing") as status:
            report = run(strategies or SPECS, getattr(torch, dtype.value), rounds=rounds, tell=status.update)
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error
    console.print(table(report))
    if out is not None:
        try:
            out.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error


def _sdpa(dtype: torch.dtype) -> str:
    return f"SDPA {str(dtype).removeprefix('torch.')}"


def _one_layer(dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 20,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def _folded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], Any]:
    rows = query.view(1, KV_HEADS, -1, HEAD_DIM)
    return lambda: scaled_dot_product_attention(rows, key, value)


def _packed(query: torch.Tensor, key: Any, value: Any) -> Callable[[], Any]:
    scoring = Scoring(Visibility(None, 1, key.shape[2], query.device), HEAD_DIM**-0.5)
    return lambda: key.layer.attend(query, key, value, scoring)


if __name__ == "__main__":
    typer.run(main)
