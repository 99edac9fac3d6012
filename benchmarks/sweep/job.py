"""What a run is asked to measure: plain data, from the command line or a YAML file, that another machine can read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from ... import registry
from ...registry import specs
from ..calibration import SAMPLES
from ..environment import Precision
from ..errors import Unusable, message

DEFAULT_TASKS = ("perplexity",)


class Job(BaseModel):
    """One run. `cachequant bench` makes it of its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategies: tuple[str, ...] = Field(default=("all",), min_length=1)
    tasks: tuple[str, ...] = Field(default=DEFAULT_TASKS, min_length=1)
    lengths: tuple[int, ...] = ()
    """For tasks that have a length and whose spec leaves it open; empty: each task's own default."""
    model: str | None = None
    text: str | None = None
    dtype: Precision = Precision.float32
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    twin: bool = True
    residual_length: int = Field(default=32, ge=0)
    calibration_text: str | None = None
    calibration_samples: int = Field(default=SAMPLES, ge=1)


class Grid(BaseModel):
    """A YAML file of a sweep: specs, or a name with lists of values, of which all combinations are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategies: tuple[str | dict[str, Any], ...] = ()
    tasks: tuple[str | dict[str, Any], ...] = ()
    lengths: tuple[int, ...] = ()


def read_grid(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Specs of strategies, specs of tasks, and lengths that a YAML file asks for.

    Raises Unusable, naming the file and the entry.
    """
    try:
        grid = Grid.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        return tuple(_specs(grid.strategies)), tuple(_specs(grid.tasks)), grid.lengths
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}", "--strategies") from error
    except (ValueError, yaml.YAMLError) as error:
        raise Unusable(f"{path}: {message(error)}", "--strategies") from error


def parse_tasks(given: Iterable[str], lengths: Sequence[int]) -> list[Any]:
    """The tasks of some specs, each at every length if it has one and leaves it open.

    Raises what `registry.tasks.parse` raises.
    """
    found = []
    for spec in given:
        task = registry.tasks.parse(spec)
        if lengths and getattr(task, "length", 0) is None and not getattr(task, "fixes_length", False):
            # made anew, so that the field's bounds hold
            found += [type(task)(**{**dict(task), "length": length}) for length in lengths]
        else:
            found.append(task)
    return found


def _specs(entries: Iterable[str | Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        fields = dict(entry)
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"{dict(entry)} has no name; write {{name: uniform, bits: [2, 4]}}")
        choices = [value if isinstance(value, list) else [value] for value in fields.values()]
        for values in product(*choices):
            yield specs.join(name, dict(zip(fields, values, strict=True)))
