"""One cell of a leaderboard, strategy by task by model, and what came out of it."""

import hashlib
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..calibration import CalibrationCard
from ..environment import Environment
from ..subjects import ModelCard
from ..tasks.base import Outcome

# Of the files that results are kept in.
RESULTS_VERSION = 1

PACKAGE = Path(__file__).resolve().parents[2]
# What figures come from. Reports may change without anything having to be measured again.
MEASURING = (
    "kernels/**/*.py",
    "core/**/*.py",
    "strategies/*.py",
    "benchmarks/tasks/*.py",
    "benchmarks/calibration.py",
    "benchmarks/contenders.py",
    "benchmarks/corpus.py",
    "benchmarks/held.py",
    "benchmarks/lm_eval/*.py",
    "benchmarks/metrics.py",
    "benchmarks/passkey.py",
    "benchmarks/reference.py",
    "benchmarks/speed.py",
    "benchmarks/streaming.py",
    "benchmarks/subjects.py",
    "benchmarks/sweep/parallel.py",
    "benchmarks/sweep/workbench.py",
)


class Cell(BaseModel):
    """All that decides a result. Equal cells need not be measured twice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results_version: int = RESULTS_VERSION
    model: ModelCard
    device: str
    strategy: str
    """Spec of the strategy or baseline."""
    contents: dict[str, Any]
    """What the strategy says of itself: its fields, and a calibration by what it holds."""
    task: str
    """Spec of the task, with what its fields left open decided."""
    settings: dict[str, Any]
    """All fields of the task."""
    inputs: dict[str, str]
    residual_length: int
    calibrated_on: dict[str, Any] | None
    """For strategies that this run calibrates."""
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def family(self) -> str:
        """The name of the strategy."""
        return self.strategy.partition(":")[0]

    @property
    def folder(self) -> str:
        """A name for people, made unique by the key."""
        words = "__".join(_slug(part) for part in (self.task, self.model.panel, self.strategy))
        return f"{words[:120]}__{self.key}"


class Result(BaseModel):
    """What came out of a cell: an outcome, or the reason why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: Cell
    environment: Environment
    outcome: Outcome | None = None
    error: str | None = None
    calibration: CalibrationCard | None = None
    seconds: float = 0.0
    """Without the calibration."""


@cache
def code_digest() -> str:
    """Of the code that figures come from."""
    digest = hashlib.sha256()
    for pattern in MEASURING:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.relative_to(PACKAGE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def source_digest(*objects: Any) -> str:
    """Of the files that define the classes of `objects`, where they are not this package's."""
    files = set()
    for each in objects:
        try:
            files.add(Path(inspect.getfile(type(each))))
        except (TypeError, OSError):
            continue  # defined in a notebook or at a prompt
    outside = sorted(path for path in files if path.is_file() and PACKAGE not in path.resolve().parents)
    return hashlib.sha256(b"".join(path.read_bytes() for path in outside)).hexdigest()[:16] if outside else ""


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=,-]+", "-", text.replace(":", "-")).strip("-")
