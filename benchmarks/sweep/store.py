"""Where results are kept: a folder per cell, so that a run goes on where it stopped and loses nothing.

    OUT/cells/perplexity-length=1056__reference__uniform-bits=2__0123456789abcdef/
        config.yaml      the cell, the environment, what was calibrated on
        metrics.json     figures with standard errors, or the error
        predictions.csv  one line per window, prompt or question
        memory.json      bytes by kind, bits by layer
        latency.json     milliseconds

A folder gets its name when all its files are written: it is whole or not there.
"""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ..errors import Unusable, message
from .cells import RESULTS_VERSION, Cell, Result

CELLS = "cells"
LOCK = ".lock"
UNFINISHED = ".unfinished-"

# Characters in a cell of predictions; csv alone takes 131,072.
LONGEST_TEXT = 2**30


class Unreadable(ValueError):
    """A folder that holds no result this version can read."""


class Store:
    """The results under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / CELLS

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and hold it for this process, which alone may write there.

        Raises Unusable where it cannot be written, or another run holds it.
        """
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            # found out before hours of work
            with tempfile.TemporaryFile(dir=self.cells):
                pass
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Unusable(
                f"another run is writing to {self.folder}; wait for it or choose another folder", "--out"
            ) from error
        except (OSError, NotImplementedError) as error:  # file systems without locks
            raise Unusable(f"cannot write to {self.folder}: {message(error)}", "--out") from error
        try:
            # what a killed run had not finished
            for path in self.cells.glob(f"{UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            lock.release()

    def find(self, cell: Cell) -> Result | None:
        """The result of `cell`, if it is here and readable."""
        path = self.cells / cell.folder
        try:
            return read(path) if path.is_dir() else None
        except Unreadable:
            return None  # measured again, and replaced

    def put(self, result: Result) -> Path:
        """Write a result; one of the same cell is replaced. Raises OSError, and leaves nothing half written."""
        path = self.cells / result.cell.folder
        made = Path(tempfile.mkdtemp(dir=self.cells, prefix=UNFINISHED))
        try:
            made.chmod(0o755)
            _write(result, made)
            if path.exists():
                shutil.rmtree(path)
            os.replace(made, path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return path

    def results(self) -> list[Result]:
        """Every result here.

        Raises Unreadable, naming the folder, for one of another version or damaged.
        """
        if not self.cells.is_dir():
            raise Unreadable(f"{self.folder} holds no results of cachequant bench (there is no folder {CELLS} in it)")
        return [read(path) for path in sorted(self.cells.iterdir()) if path.is_dir() and path.name[0] != "."]


def read(path: Path) -> Result:
    """The result in a cell's folder. Raises Unreadable."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        version = config["cell"]["results_version"]
        if version != RESULTS_VERSION:
            raise Unreadable(
                f"{path} was written in version {version} of the results' format, this is version {RESULTS_VERSION}; "
                "measure it again, or read it with the cachequant that wrote it"
            )
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = {**config, "error": metrics["error"], "seconds": metrics["seconds"]}
        if metrics["error"] is None:
            memory = json.loads((path / "memory.json").read_text(encoding="utf-8"))
            found["outcome"] = {
                "metrics": metrics["metrics"],
                "directions": metrics["directions"],
                "errors": metrics["standard_errors"],
                "samples": _read_samples(path / "predictions.csv", metrics["samples"]),
                **memory,
                "latency": json.loads((path / "latency.json").read_text(encoding="utf-8")),
            }
        return Result.model_validate(found)
    except Unreadable:
        raise
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError, csv.Error) as error:
        raise Unreadable(f"{path} is damaged ({message(error)}); delete it and run the same command again") from error


def _write(result: Result, folder: Path) -> None:
    # JSON's types alone
    config = json.loads(result.model_dump_json(include={"cell", "environment", "calibration"}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    outcome = result.outcome
    metrics = {
        "error": result.error,
        "seconds": result.seconds,
        "metrics": outcome.metrics if outcome else {},
        "directions": outcome.directions if outcome else {},
        "standard_errors": outcome.errors if outcome else {},
        "samples": _layout(outcome.samples) if outcome else {},
    }
    _json(folder / "metrics.json", metrics)
    if outcome is None:
        return
    _json(folder / "memory.json", outcome.model_dump(mode="json", include={"memory", "kinds", "layers"}))
    _json(folder / "latency.json", outcome.latency)
    names = list(dict.fromkeys(name for sample in outcome.samples for name in sample))
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        # texts in quotes: they may hold anything
        writer = csv.DictWriter(file, names, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(outcome.samples)


def _layout(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a CSV file cannot say: how many lines it has, which columns are of texts, and where those have none."""
    texts = sorted({name for sample in samples for name, value in sample.items() if isinstance(value, str)})
    absent = {name: [i for i, sample in enumerate(samples) if sample.get(name) is None] for name in texts}
    return {"lines": len(samples), "text_columns": {name: {"absent": absent[name]} for name in texts}}


def _read_samples(path: Path, layout: dict[str, Any]) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST_TEXT)
    with path.open(encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    if len(lines) != layout["lines"]:
        raise ValueError(f"{path.name} has {len(lines)} lines of {layout['lines']}")
    texts = layout["text_columns"]
    samples = [
        {name: value if name in texts else float(value) if value else None for name, value in line.items()}
        for line in lines
    ]
    for name, column in texts.items():
        for i in column["absent"]:
            samples[i][name] = None
    return samples


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
