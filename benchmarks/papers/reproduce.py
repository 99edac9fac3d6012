"""A paper's evaluation with our strategies, its own figures beside ours."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor

from ... import registry
from ...core import MemoryReport, SimulatedCache, detach
from ..calibration import CalibrationText, Calibrator
from ..environment import Environment
from ..errors import Unusable, message
from ..subjects import ModelCard, TextCard
from .figures import Paper, Row, Table

TOLERANCE = 0.02

# Logits turned to float32 at a time.
SCORED_AT_ONCE = 1024

# What a cache of the same tokens would not hold: the simulation keeps every token exact as well.
SIMULATION_ROWS = frozenset({"tail", "spare"})


class Protocol(BaseModel):
    """How much text is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int
    """Tokens per window, of both texts."""
    windows: int
    samples: int
    """Windows of the calibration."""


class Measured(BaseModel):
    """One strategy on the model: its perplexity and size, or the reason why there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float | None = None
    bits: float | None = None
    """Per number, as a cache of one window would hold it: sinks, tables and rotary angles included."""
    packed_bits: float | None = None
    """Of codes, scales and outliers alone, to which `bits` falls in long contexts and large models."""
    calibration_seconds: float | None = None
    """Shared by strategies that need the same statistics."""
    seconds: float = 0.0
    error: str | None = None


class Line(BaseModel):
    """One row of the paper, theirs and ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: int
    row: str
    spec: str | None
    differs: str | None
    paper: float | None
    """Perplexity; None where the paper has no figure for the model."""
    paper_bits: tuple[float, float] | None
    ours: Measured

    @computed_field
    @property
    def difference(self) -> float | None:
        """Ours less theirs."""
        if self.paper is None or self.ours.perplexity is None:
            return None
        return self.ours.perplexity - self.paper

    @computed_field
    @property
    def reproduced(self) -> bool | None:
        """Whether they agree to `TOLERANCE`; figures are printed with two decimals."""
        return None if self.difference is None else abs(round(self.difference, 2)) <= TOLERANCE


class Ordering(BaseModel):
    """Two rows of one table, the first of which is better on every model of the paper; and ours of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: int
    better: str
    worse: str
    ours: tuple[float, float]

    @computed_field
    @property
    def verdict(self) -> str:
        """holds, ties or broken."""
        return "holds" if self.ours[0] < self.ours[1] else "ties" if self.ours[0] == self.ours[1] else "broken"


class Reproduction(BaseModel):
    """All rows that were measured, with their conditions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source: str
    differences: tuple[str, ...]
    paper_model: str | None
    """Whose figures stand beside ours."""
    model: ModelCard
    protocol: Protocol
    text: TextCard
    calibration_text: TextCard
    environment: Environment
    notes: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    orderings: tuple[Ordering, ...] = ()


class StreamText(CalibrationText):
    """A calibration text cut as the paper cuts it: out of one stream of tokens, so that windows begin anywhere."""

    def __init__(self, name: str, text: str, ids: Sequence[int], length: int, samples: int) -> None:
        super().__init__(lambda: (name, text), None, samples)
        self._cut = spread(ids, length, samples)

    def windows(self, model: Any) -> Tensor:
        """Token ids `[samples, length]`."""
        return self._cut


def stream_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a whole text, beginning as the tokenizer begins a text."""
    ids = tokenizer(text, verbose=False).input_ids
    added = tokenizer("").input_ids
    ends = added and added[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if ends else ids


def consecutive(ids: Sequence[int], length: int, limit: int | None) -> Tensor:
    """Windows `[windows, length]` that follow one another; with a limit, that many of them, evenly spaced.

    Raises Unusable when the text has no whole window.
    """
    total = len(ids) // length
    if not total:
        raise Unusable(f"the text has {len(ids)} tokens, less than one window of {length}", "--text")
    wanted = min(total, limit or total)
    return torch.tensor([ids[at * length : (at + 1) * length] for at in (i * total // wanted for i in range(wanted))])


def spread(ids: Sequence[int], length: int, samples: int) -> Tensor:
    """Windows `[samples, length]` from the beginning to the end of a text, not overlapping.

    Raises Unusable when the text is too short.
    """
    if len(ids) < samples * length:
        raise Unusable(
            f"the text has {len(ids)} tokens, {samples} windows of {length} need {samples * length}; "
            f"use at most {len(ids) // length} samples, or a longer text",
            "--calibration-text",
        )
    starts = [i * (len(ids) - length) // max(1, samples - 1) for i in range(samples)]
    return torch.tensor([ids[start : start + length] for start in starts])


def text_card(name: str, text: str, ids: Sequence[int]) -> TextCard:
    """What names a text in a report."""
    return TextCard(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), tokens=len(ids))


@torch.inference_mode()
def perplexity(
    model: Any, strategy: Any, windows: Tensor, tick: Callable[[], None] = lambda: None
) -> tuple[float, MemoryReport]:
    """exp of the mean loss of all tokens of `windows [n, length]` but the first of each, and the last cache's memory.

    Every key and value is read as what its codes stand for. Windows are independent.

    Raises ValueError where the loss is not finite.
    """
    total = 0.0
    report = None
    for window in windows.to(model.device):
        cache = SimulatedCache(model, strategy, every_token=True)
        logits = model(window[None], past_key_values=cache, use_cache=True).logits[0, :-1]
        for scores, targets in zip(logits.split(SCORED_AT_ONCE), window[1:].split(SCORED_AT_ONCE), strict=True):
            total += float(torch.nn.functional.cross_entropy(scores.float(), targets, reduction="sum"))
        report = cache.memory()
        tick()
    if report is None or not math.isfinite(total):
        raise ValueError(f"the loss over {len(windows)} windows is {total}; the dtype may be too narrow for the model")
    return math.exp(total / (windows.numel() - len(windows))), report


def measure(model: Any, spec: str, windows: Tensor, calibrator: Calibrator, tick: Callable[[], None]) -> Measured:
    """One strategy. Whatever it raises is reported."""
    start = time.perf_counter()
    try:
        strategy, card = calibrator.ready(registry.parse(spec))
        value, report = perplexity(model, strategy, windows, tick)
    except Exception as error:
        return Measured(error=f"{type(error).__name__}: {message(error)}", seconds=time.perf_counter() - start)
    finally:
        detach(model)
    held = {name: size for name, size in report.rows.items() if name not in SIMULATION_ROWS}
    packed = [size for name, size in held.items() if name.startswith(("key ", "value "))]
    return Measured(
        perplexity=value,
        bits=8 * sum(held.values()) / report.elements,
        packed_bits=8 * sum(packed) / report.elements,
        calibration_seconds=card and card.seconds,
        seconds=round(time.perf_counter() - start, 3),
    )


Plan = list[tuple[Table, Row]]


def choose(paper: Paper, tables: Sequence[str] | None, rows: Sequence[str] | None) -> Plan:
    """Rows to measure: of these tables (numbers, or `all`), of these names.

    Raises Unusable for names that there are not.
    """
    numbers = [str(table.number) for table in paper.tables]
    asked = numbers if tables and "all" in tables else list(tables or numbers[:1])
    if unknown := [number for number in asked if number not in numbers]:
        raise Unusable(f"no table {', '.join(unknown)}; there are {', '.join(numbers)}, or all", "--tables")
    plan = [(table, row) for table in paper.tables if str(table.number) in asked for row in table.rows]
    if rows:
        names = {row.name for _, row in plan}
        if unknown := [name for name in rows if name not in names]:
            raise Unusable(
                f"no row {', '.join(unknown)} in table {', '.join(asked)}; there are {', '.join(sorted(names))}",
                "--rows",
            )
        plan = [(table, row) for table, row in plan if row.name in rows]
    return plan


def run(
    model: Any,
    windows: Tensor,
    plan: Plan,
    paper_model: str | None,
    calibrator: Calibrator,
    begin: Callable[[str], None],
    tick: Callable[[], None],
) -> Iterator[Line]:
    """Measure row by row, each strategy once. `begin` is told each strategy, `tick` called after each window."""
    known: dict[str, Measured] = {}
    for table, row in plan:
        if row.spec is not None and row.spec not in known:
            begin(row.spec)
            known[row.spec] = measure(model, row.spec, windows, calibrator, tick)
        yield Line(
            table=table.number,
            row=row.name,
            spec=row.spec,
            differs=row.differs,
            paper=table.figure(row, paper_model),
            paper_bits=row.bits,
            ours=Measured(error=f"not run: {row.not_run}") if row.spec is None else known[row.spec],
        )


def orderings(paper: Paper, lines: Sequence[Line]) -> tuple[Ordering, ...]:
    """The paper's orderings among rows that were measured."""
    ours = {(line.table, line.row): line.ours.perplexity for line in lines}
    found = []
    for table in paper.tables:
        for better, worse in table.orderings():
            first, second = ours.get((table.number, better)), ours.get((table.number, worse))
            if first is not None and second is not None:
                found.append(Ordering(table=table.number, better=better, worse=worse, ours=(first, second)))
    return tuple(found)
