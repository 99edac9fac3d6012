"""Where a job's cells are measured: models loaded, texts read, exact runs kept while they are needed."""

import hashlib
import json
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import registry
from ...core import detach
from ..calibration import uncalibrated
from ..contenders import Baseline, Candidate, Contender, candidates, needs_calibration
from ..environment import Environment
from ..errors import Unusable, message
from ..subjects import Panel, open_panels
from ..tasks.base import Outcome
from . import parallel
from .cells import Cell, Result, code_digest, source_digest
from .job import Job, parse_tasks


@dataclass(frozen=True)
class Planned:
    """A cell and what measures it."""

    cell: Cell
    candidate: Candidate
    task: Any
    panel: Panel


class Workbench:
    """The cells of a job, task by task and strategy by strategy, and the means to measure them.

    Raises Unusable for what cannot be measured, before anything is.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.threads:
            torch.set_num_threads(job.threads)
        try:
            chosen = candidates(job.strategies)
        except (LookupError, ValueError, OSError) as error:
            raise Unusable(message(error), "--strategies") from error
        try:
            tasks = parse_tasks(job.tasks, job.lengths)
        except (LookupError, ValueError, OSError, ImportError) as error:
            raise Unusable(message(error), "--tasks") from error
        self.panels, self.notes = open_panels(
            job.model,
            None if job.text is None else Path(job.text),
            dtype=getattr(torch, job.dtype.value),
            device=job.device,
            twin=job.twin,
            residual_length=job.residual_length,
            calibration_text=None if job.calibration_text is None else Path(job.calibration_text),
            calibration_samples=job.calibration_samples,
            calibrating=any(map(needs_calibration, chosen)),
        )
        if parallel.world_size() > 1:
            self.notes.append(
                f"the model is split over {parallel.world_size()} processes; bytes are those of the first"
            )
        self.notes += _unheeded(chosen, job.residual_length)
        self.environment = Environment.current(str(self.panels[0].model.device))
        self._calibrated_on = _calibrated_on(job, self.environment)
        # the tokenizer, by what it makes of the text
        self._tokens = hashlib.sha256(array("q", self.panels[0].ids).tobytes()).hexdigest()[:16]
        self.cells = self._plan(chosen, tasks)
        self._prepared: tuple[Any, dict[str, Any]] = (None, {})

    def measure(self, planned: Planned) -> Result:
        """One cell. Whatever a strategy or task raises is its result."""
        result = self._measure(planned)
        # processes that share a model have to go on together
        if parallel.world_size() > 1 and parallel.total(result.error is not None) and result.error is None:
            return result.model_copy(update={"outcome": None, "error": "another process failed at this cell"})
        return result

    def _measure(self, planned: Planned) -> Result:
        result = Result(cell=planned.cell, environment=self.environment)
        panel = planned.panel
        start = time.perf_counter()
        try:
            prepared = self._prepare(planned.task, panel)
            contender = planned.candidate.ready(panel)
            result = result.model_copy(update={"calibration": contender.calibration})
            self._matching_attention(panel, contender)
            start = time.perf_counter()
            outcome = planned.task.measure(panel, prepared, contender)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"task {planned.task.name!r} gave {type(outcome).__name__} instead of an Outcome")
        except Exception as error:
            reason = f"{type(error).__name__}: {message(error)}"
            return result.model_copy(update={"error": reason, "seconds": round(time.perf_counter() - start, 3)})
        finally:
            detach(panel.model)
        return result.model_copy(update={"outcome": outcome, "seconds": round(time.perf_counter() - start, 3)})

    def listen(self, report: Callable[[str, int, int], None]) -> None:
        """Call `report(pass, windows done, windows)` while strategies are calibrated."""
        for panel in self.panels:
            panel.calibrator.report = report

    def _prepare(self, task: Any, panel: Panel) -> Any:
        # those of one task at a time: an exact run may be large
        if self._prepared[0] != task:
            self._prepared = (task, {})
        kept = self._prepared[1]
        if panel.card.panel not in kept:
            kept[panel.card.panel] = task.prepare(panel)
        return kept[panel.card.panel]

    def _matching_attention(self, panel: Panel, contender: Contender) -> None:
        """Baselines run as transformers runs them."""
        if contender.strategy is None:
            detach(panel.model)

    def _plan(self, chosen: list[Candidate], tasks: list[Any]) -> list[Planned]:
        found: dict[str, Planned] = {}
        for task in tasks:
            fitted = {}
            for panel in self.panels:
                try:
                    fits = task.fitted(panel)
                    fitted[panel.card.panel] = (fits, fits.inputs(panel))
                except (LookupError, ValueError, OSError, ImportError) as error:
                    raise Unusable(f"{registry.tasks.spec(task)}: {message(error)}", "--tasks") from error
            for candidate in chosen:
                for panel in self.panels:
                    fits, inputs = fitted[panel.card.panel]
                    planned = self._planned(candidate, fits, inputs, panel)
                    found.setdefault(planned.cell.key, planned)
        return list(found.values())

    def _planned(self, candidate: Candidate, task: Any, inputs: dict[str, str], panel: Panel) -> Planned:
        contents, learns, source = _contents(candidate)
        env = self.environment
        cell = Cell(
            model=panel.card,
            device=env.device,
            strategy=candidate.spec,
            contents=contents,
            task=registry.tasks.spec(task),
            settings=task.model_dump(mode="json"),
            inputs=inputs,
            residual_length=self.job.residual_length,
            calibrated_on=self._calibrated_on if learns else None,
            versions={
                "cachequant": env.cachequant,
                "torch": env.torch,
                "transformers": env.transformers,
                "code": code_digest(),
                "plugins": source_digest(source, task),
                "processes": str(parallel.world_size()),
                "tokens": self._tokens,
            },
        )
        return Planned(cell, candidate, task, panel)


def _contents(candidate: Candidate) -> tuple[dict[str, Any], bool, Any]:
    """What a candidate says of itself, whether this run has to calibrate it, and the object."""
    source = None
    try:
        source = candidate.build()
        if isinstance(source, Baseline):
            return {**source.model_dump(mode="json"), "versions": source.versions()}, False, source
        learns = uncalibrated(source)
        describe = getattr(source, "describe", None)
        # the spec has the settings of those that say nothing; their repr may hold an address
        contents = describe() if describe else {"name": source.name}
        return json.loads(json.dumps(contents)), learns, source
    except Exception:
        return {}, False, source  # told when the run comes to it


def _unheeded(chosen: list[Candidate], residual_length: int) -> list[str]:
    """Strategies whose own exact tail gives way to that of the run, which is the same for all."""
    asked = []
    for candidate in chosen:
        options = getattr(_contents(candidate)[2], "cache_options", dict)
        with suppress(Exception):  # told when the run comes to it
            length = options().get("residual_length", residual_length)
            if length != residual_length:
                asked.append(f"{candidate.spec} asks for {length}")
    return [f"every row keeps the newest {residual_length} tokens exact, but {'; '.join(asked)}"] if asked else []


def _calibrated_on(job: Job, environment: Environment) -> dict[str, Any]:
    """What decides a calibration of this run. The standard library is that of the Python that runs."""
    if job.calibration_text is None:
        return {"text": f"standard library of Python {environment.python}", "samples": job.calibration_samples}
    path = Path(job.calibration_text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"text": path.name, "text_sha256": digest, "samples": job.calibration_samples}
