"""Every strategy on every model under one protocol: rows of memory held and accuracy kept."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import DynamicCache

from .. import registry
from ..core import MemoryReport, PackedCache, detach
from ..core.calibration import CalibratedStrategy
from .calibration import CalibrationCard, Calibrator
from .environment import Environment
from .metrics import Accuracy, pareto_front
from .streaming import ExactRun, Protocol


class ModelCard(BaseModel):
    """Which model was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: str
    """Short name of the model, the heading of its columns."""
    architecture: str
    parameters: int
    layers: int
    context: int
    dtype: str
    weights_sha256: str | None = None
    """Of the files the model was loaded from; a twin has its model's."""


class TextCard(BaseModel):
    """Which text was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    tokens: int


class Memory(BaseModel):
    """What the cache held at the end of the windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Per window."""
    device_bytes: int
    host_bytes: int
    exact_bytes: int
    bits_per_element: float
    """Device bits per key or value number as held: exact tail, metadata and spare capacity included."""
    packed_bits_per_element: float
    """The same of the packed part alone, to which long contexts converge."""
    ratio: float
    """How many times smaller than the unquantized cache in the model's dtype."""


class Row(BaseModel):
    """One strategy on one model: its memory and accuracy, or the reason why there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: str
    strategy: str
    """The spec that `registry.parse` turns back into the strategy."""
    memory: Memory | None = None
    accuracy: Accuracy | None = None
    calibration: CalibrationCard | None = None
    """What it was calibrated on for this row; None if it needs no calibration, or the spec names one."""
    seconds: float = 0.0
    """Without the calibration."""
    error: str | None = None
    pareto: bool = False
    """No other row of the panel has at most its bits and at most its mean divergence, one of them smaller."""


class Leaderboard(BaseModel):
    """All rows with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol
    environment: Environment
    text: TextCard
    models: tuple[ModelCard, ...]
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def with_rows(self, rows: Iterable[Row]) -> "Leaderboard":
        """The same leaderboard with `rows`, Pareto fronts marked anew."""
        return self.model_copy(update={"rows": tuple(mark_pareto(rows))})


@dataclass(frozen=True)
class Subject:
    """A model to measure on, its exact run, and what calibrates strategies for it: None refuses those that need it."""

    card: ModelCard
    model: Any
    exact: ExactRun
    calibrator: Calibrator | None = None

    @classmethod
    def of(
        cls, card: ModelCard, model: Any, windows: Tensor, protocol: Protocol, calibrator: Calibrator | None = None
    ) -> "Subject":
        """Run `model` exactly, in the eyes of transformers alone: nothing of ours is attached to it."""
        detach(model)
        exact = ExactRun(model, windows, protocol, lambda: DynamicCache(config=model.config))
        return cls(card, model, exact, calibrator)

    def ready(self, strategy: Any) -> tuple[Any, CalibrationCard | None]:
        """The strategy, calibrated for this model if it needs that, and what it learned from then."""
        return (strategy, None) if self.calibrator is None else self.calibrator.ready(strategy)


@dataclass(frozen=True)
class Candidate:
    """A strategy that may turn out not to exist: plugins break in their constructors too."""

    spec: str
    build: Callable[[], Any]


def installed() -> list[Candidate]:
    """The variants of all installed strategies."""
    return [variant(cls, settings) for cls in registry.strategies().values() for settings in cls.variants]


def variant(cls: Any, settings: dict[str, Any]) -> Candidate:
    """A strategy class with settings, which it need not accept."""
    try:
        strategy = cls(**settings)
    except Exception:
        # told again, and reported, when the leaderboard comes to it
        spec = ",".join(f"{name}={value}" for name, value in settings.items())
        return Candidate(f"{cls.name}:{spec}" if spec else cls.name, lambda: cls(**settings))
    return Candidate(registry.spec(strategy), lambda: strategy)


def candidates(specs: Iterable[str]) -> list[Candidate]:
    """Candidates of spec strings like `uniform:bits=4`.

    Raises what `registry.parse` raises.
    """
    parsed = [registry.parse(spec) for spec in specs]
    return [Candidate(registry.spec(strategy), lambda strategy=strategy: strategy) for strategy in parsed]


def needs_calibration(candidate: Candidate) -> bool:
    """Whether it has to be calibrated before it can be measured."""
    try:
        strategy = candidate.build()
    except Exception:
        return False  # told when the leaderboard comes to it
    return isinstance(strategy, CalibratedStrategy) and not strategy.calibrated


def run(subjects: Iterable[Subject], candidates: Iterable[Candidate]) -> Iterator[Row]:
    """Measure every candidate on every subject, strategy by strategy; a failure is a row, not the end."""
    subjects = list(subjects)
    for candidate in candidates:
        for subject in subjects:
            yield measure(subject, candidate)


def measure(subject: Subject, candidate: Candidate) -> Row:
    """One row. Whatever a strategy raises is reported in it."""
    row = Row(panel=subject.card.panel, strategy=candidate.spec)
    start = time.perf_counter()
    try:
        strategy, card = subject.ready(candidate.build())
        row = row.model_copy(update={"calibration": card})
        start = time.perf_counter()
        protocol = subject.exact.protocol
        cache = PackedCache(subject.model, strategy, residual_length=protocol.residual_length)
        accuracy = subject.exact.compare(subject.model, cache)
        memory = summarize_memory(cache.memory())
    except Exception as error:
        return row.model_copy(
            update={"error": f"{type(error).__name__}: {message(error)}", "seconds": time.perf_counter() - start}
        )
    finally:
        detach(subject.model)
    return row.model_copy(
        update={"accuracy": accuracy, "memory": memory, "seconds": round(time.perf_counter() - start, 3)}
    )


def summarize_memory(report: MemoryReport) -> Memory:
    """The figures of a leaderboard row."""
    return Memory(
        tokens=report.tokens,
        device_bytes=report.device_bytes,
        host_bytes=report.host_bytes,
        exact_bytes=report.exact_bytes,
        bits_per_element=report.bits_per_element,
        packed_bits_per_element=packed_bits(report),
        ratio=report.ratio,
    )


# What does not grow with the context, or is kept exact on purpose.
UNPACKED_ROWS = frozenset(
    {
        "tail",
        "cut block",
        "sinks",
        "spare",
        "codebooks",
        "static scales",
        "attention history",
        "host layers",
        "host copy",
    }
)


def packed_bits(report: MemoryReport) -> float:
    """Device bits per number of the packed part alone; 0 where nothing is packed."""
    exact_tokens = sum(report.rows.get(name, 0) for name in ("tail", "sinks"))
    share = 1 - exact_tokens / report.exact_bytes if report.exact_bytes else 0.0
    packed = sum(size for name, size in report.rows.items() if name not in UNPACKED_ROWS)
    return 8 * packed / (report.elements * share) if packed and share > 0 else 0.0


def mark_pareto(rows: Iterable[Row]) -> list[Row]:
    """The rows with `pareto` set panel by panel, on device bits and mean divergence."""
    marked = list(rows)
    for panel in {row.panel for row in marked}:
        places = [
            (place, row.memory.bits_per_element, row.accuracy.kl_mean)
            for place, row in enumerate(marked)
            if row.panel == panel and row.memory and row.accuracy
        ]
        front = pareto_front([(bits, divergence) for _, bits, divergence in places])
        for (place, _, _), optimal in zip(places, front, strict=True):
            marked[place] = marked[place].model_copy(update={"pareto": optimal})
    return marked


def message(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, ValidationError):
        # pydantic's own text spreads over lines and ends in an address
        return "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}" if each["loc"] else each["msg"]
            for each in error.errors()
        )
    return " ".join(str(error).split())[:500] or type(error).__name__
