"""What `pytest --benchmark-only` was asked to measure, read from its options before anything is collected."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .. import registry
from .contenders import baselines, candidates
from .environment import Precision
from .errors import message
from .pytest_options import LENGTHS, TASKS, destination
from .sweep.job import Job, parse_tasks

MODEL, TWIN = "model", "twin"


@dataclass(frozen=True)
class Asked:
    """The job, and what benchmarks are made for."""

    job: Job
    strategies: tuple[str, ...]
    """Specs, of baselines too."""
    tasks: tuple[str, ...]
    """Specs."""
    lengths: tuple[int, ...]
    lengths_given: bool
    """Whether a length that the model does not take is a mistake, or none of the defaults to be measured."""

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Values of the parameters that benchmarks may have, the slowest to change first."""
        panels = (MODEL, TWIN) if self.job.twin else (MODEL,)
        return {"task": self.tasks, "context": self.lengths, "strategy": self.strategies, "panel": panels}


def asked(config: pytest.Config) -> Asked:
    """What the options say. Raises pytest.UsageError, naming the option."""

    def given(option: str) -> Any:
        return config.getoption(destination(option))

    specs = tuple(_split(given("--strategies") or ["all"]))
    tasks = tuple(_split(given("--tasks") or TASKS))
    beside = [] if given("--no-baselines") else [candidate.spec for candidate in baselines()]
    try:
        found = candidates([*specs, *beside])
    except (LookupError, ValueError, OSError) as error:
        raise _usage("--strategies", error) from error
    try:
        parsed = parse_tasks(tasks, ())
    except (LookupError, ValueError, OSError, ImportError) as error:
        raise _usage("--tasks", error) from error
    lengths = given("--lengths")
    job = Job(
        strategies=(*specs, *beside),
        tasks=tasks,
        model=given("--model"),
        text=given("--text"),
        dtype=_dtype(given("--dtype") or Precision.float32),
        device=_device(given("--device") or "cpu"),
        threads=_threads(given("--threads")),
        twin=not given("--no-twin"),
        calibration_text=given("--calibration-text"),
    )
    return Asked(
        job=job,
        strategies=tuple(each.spec for each in found),
        tasks=tuple(map(registry.tasks.spec, parsed)),
        lengths=_lengths(lengths),
        lengths_given=lengths is not None,
    )


def _split(given: Any) -> list[str]:
    found = [spec.strip() for text in given for spec in text.split(";") if spec.strip()]
    if not found:
        raise pytest.UsageError("--strategies, --tasks: nothing was given; write specs separated by ';'")
    return found


def _lengths(given: str | None) -> tuple[int, ...]:
    if given is None:
        return LENGTHS
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise pytest.UsageError(f"--lengths: cannot read {given!r}; write tokens separated by commas, such as 512,4096")
    return lengths


def _dtype(given: str) -> Precision:
    try:
        return Precision(given)
    except ValueError:
        raise pytest.UsageError(f"--dtype: {given!r} is none of {', '.join(Precision)}") from None


def _device(given: str) -> str:
    try:
        torch.empty(1, device=given)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise _usage("--device", error) from error
    return given


def _threads(given: str | None) -> int | None:
    if given is None or (given.isdecimal() and int(given) > 0):
        return None if given is None else int(given)
    raise pytest.UsageError(f"--threads: {given!r} is no number of threads; write 1 or more")


def _usage(option: str, error: BaseException) -> pytest.UsageError:
    return pytest.UsageError(f"{option}: {message(error)}")
