"""What a session of `pytest --benchmark-only` measures on, and what it has found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from .. import registry
from ..core import detach
from .asked import TWIN, Asked
from .contenders import Candidate, Contender
from .errors import Unusable, message
from .held import Memory
from .report.run import Run
from .subjects import Panel
from .sweep.cells import Result
from .sweep.run import finite
from .sweep.workbench import Planned, Workbench

# Tokens decoded one by one behind each context; one more warms up.
DECODED = 16

# Tokens that are packed at a time; all that a model takes where that is less.
PACKED = 1024


@dataclass
class Arena:
    """Models loaded, strategies found, results so far."""

    bench: Workbench
    results: list[Result] = field(default_factory=list)
    """Of accuracy and memory."""
    failures: list[str] = field(default_factory=list)
    """Of the other groups."""
    _prepared: tuple[Any, dict[str, Any]] = (None, {})

    @classmethod
    def open(cls, asked: Asked, contexts: set[int]) -> "Arena":
        """Loads model and texts. contexts: those that will be decoded at.

        Raises pytest.UsageError, naming the option that would mend it.
        """
        try:
            arena = cls(Workbench(asked.job))
        except Unusable as error:
            raise pytest.UsageError(f"{error.option}: {error}") from error
        for context in sorted(contexts) if asked.lengths_given else ():
            if reason := arena.refusal(context):
                raise pytest.UsageError(f"--lengths: {reason}")
        return arena

    def panel(self, which: str) -> Panel:
        """The model, or its twin. Skips the benchmark where there is none."""
        panels = self.bench.panels
        if which != TWIN:
            return panels[0]
        if not panels[1:]:
            pytest.skip(" ".join(self.bench.notes))
        return panels[1]

    def candidate(self, spec: str) -> Candidate:
        """The strategy or baseline of that spec."""
        return next(planned.candidate for planned in self.bench.cells if planned.candidate.spec == spec)

    def planned(self, task: str, spec: str, panel: Panel) -> Planned:
        """What is to be measured of a strategy on a model."""
        fitted = registry.tasks.parse(task).fitted(panel)
        return next(
            each
            for each in self.bench.cells
            if each.panel is panel and each.candidate.spec == spec and each.task == fitted
        )

    def prepared(self, planned: Planned) -> Any:
        """What all strategies share at a task on a model: kept for one task at a time, exact runs may be large."""
        if self._prepared[0] != planned.cell.task:
            self._prepared = (planned.cell.task, {})
        kept, name = self._prepared[1], planned.panel.card.panel
        if name not in kept:
            kept[name] = planned.task.prepare(planned.panel)
        return kept[name]

    @contextmanager
    def measuring(self, group: str, spec: str) -> Iterator[Contender]:
        """A strategy ready on the model; whatever is raised inside fails the benchmark and is told in the summary."""
        panel = self.bench.panels[0]
        detach(panel.model)  # transformers' caches run as transformers runs them, packed ones attach themselves
        try:
            yield self.candidate(spec).ready(panel)
        except Exception as error:
            reason = f"{type(error).__name__}: {message(error)}"
            self.failures.append(f"{group}: {spec}: {reason}")
            pytest.fail(reason, pytrace=False)
        finally:
            detach(panel.model)

    def enter(self, result: Result) -> Result:
        """Puts a row on the leaderboard; fails the benchmark where there are no figures."""
        result = finite(result)
        self.results.append(result)
        if result.error:
            pytest.fail(result.error, pytrace=False)
        return result

    def ids(self, tokens: int) -> Tensor:
        """The text's first token ids `[1, tokens]`."""
        panel = self.bench.panels[0]
        return torch.tensor([[*self._start, *panel.ids[:tokens]][:tokens]], device=panel.model.device)

    @property
    def packed(self) -> int:
        """Tokens that are packed at a time."""
        return min(PACKED, self._room)

    def refusal(self, context: int) -> str | None:
        """Why the model cannot decode behind so many tokens; None where it can."""
        most = self._room - DECODED - 1
        if context <= most:
            return None
        card, text = self.bench.panels[0].card, self.bench.panels[0].text
        return (
            f"{context} tokens and {DECODED + 1} more are beyond the context of {card.panel}, {card.context}, or the "
            f"{text.tokens} tokens of {text.name}; use at most {most}"
        )

    def record(self) -> Run:
        """The leaderboard so far."""
        bench = self.bench
        return Run(
            environment=bench.environment,
            text=bench.panels[0].text,
            models=tuple(panel.card for panel in bench.panels),
            residual_length=bench.job.residual_length,
            notes=tuple(bench.notes),
            results=tuple(self.results),
        )

    def conditions(self) -> dict[str, Any]:
        """Without which the figures mean nothing, as JSON."""
        return self.record().model_dump(mode="json", include={"environment", "text", "models", "residual_length"})

    @property
    def _start(self) -> list[int]:
        bos = self.bench.panels[0].tokenizer.bos_token_id
        return [] if bos is None else [bos]

    @property
    def _room(self) -> int:
        panel = self.bench.panels[0]
        return min(panel.card.context, len(panel.ids) + len(self._start))


def of_memory(memory: Memory) -> dict[str, float]:
    """The figures of `extra_info` that all groups have of a cache."""
    return {
        "bytes": memory.device_bytes,
        "host_bytes": memory.host_bytes,
        "bits_per_element": memory.bits_per_element,
        "packed_bits_per_element": memory.packed_bits_per_element,
        "ratio": memory.ratio,
    }
