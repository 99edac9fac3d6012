"""Every strategy on every model under one protocol: rows of memory held and accuracy kept."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..core import detach
from .calibration import CalibrationCard
from .contenders import Candidate
from .environment import Environment
from .errors import Unusable, message
from .held import Memory, weigh
from .metrics import Accuracy, pareto_front
from .streaming import ExactRun, Protocol
from .subjects import ModelCard, Panel, TextCard, open_panels
from .tasks.perplexity import Perplexity


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
    """A panel and its exact run."""

    panel: Panel
    exact: ExactRun


def prepare(
    model: str | None = None,
    text: Path | None = None,
    *,
    windows: int = 6,
    window_length: int | None = None,
    residual_length: int = 32,
    **options: Any,
) -> tuple[Leaderboard, list[Subject]]:
    """An empty leaderboard, and the models with their exact runs. options: those of `open_panels`.

    Raises Unusable.
    """
    panels, notes = open_panels(model, text, residual_length=residual_length, **options)
    task = Perplexity(windows=windows, length=window_length)
    try:
        protocol = task.protocol(panels[0])
    except ValueError as error:
        raise Unusable(message(error), "--window-length") from error
    try:
        subjects = [Subject(panel, task.prepare(panel)) for panel in panels]
    except ValueError as error:
        raise Unusable(message(error), "--text") from error
    board = Leaderboard(
        protocol=protocol,
        environment=Environment.current(str(panels[0].model.device)),
        text=panels[0].text,
        models=tuple(panel.card for panel in panels),
        notes=tuple(notes),
    )
    return board, subjects


def run(subjects: Iterable[Subject], candidates: Iterable[Candidate]) -> Iterator[Row]:
    """Measure every candidate on every subject, strategy by strategy; a failure is a row, not the end."""
    subjects = list(subjects)
    for candidate in candidates:
        for subject in subjects:
            yield measure(subject, candidate)


def measure(subject: Subject, candidate: Candidate) -> Row:
    """One row. Whatever a strategy raises is reported in it."""
    panel = subject.panel
    row = Row(panel=panel.card.panel, strategy=candidate.spec)
    start = time.perf_counter()
    try:
        contender = candidate.ready(panel)
        row = row.model_copy(update={"calibration": contender.calibration})
        start = time.perf_counter()
        cache = contender.new_cache()
        accuracy = subject.exact.compare(panel.model, cache)
        _, memory = weigh(cache, panel.model, subject.exact.protocol.windows)
    except Exception as error:
        return row.model_copy(
            update={"error": f"{type(error).__name__}: {message(error)}", "seconds": time.perf_counter() - start}
        )
    finally:
        detach(panel.model)
    return row.model_copy(
        update={"accuracy": accuracy, "memory": memory, "seconds": round(time.perf_counter() - start, 3)}
    )


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
