"""A calibration as an object and as a folder: safetensors for the numbers, JSON for everything a reader asks about."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...kernels.format import Format, LayerFormat, MixedFormat, Side
from ..protocol import LayerSpec
from .statistics import Statistics

FILE_VERSION = 1
RECORD, NUMBERS = "calibration.json", "calibration.safetensors"


class Recipe(BaseModel):
    """What a strategy wants measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outliers: float = 0.0
    """Share of each channel's numbers beyond its static range, half of it at either end."""
    sink_tokens: int = 0
    """First tokens of each window that are left out of the densities."""
    ranges_include_sinks: bool = False
    """Whether static ranges cover the sinks all the same."""
    gradients: bool = False
    """Whether numbers are weighted by Fisher information, which takes a backward pass."""
    query_quantile: float | None = Field(default=None, ge=0, le=1)
    """Which quantile of the squared norms of scaled queries is measured, 0.9 for that of nine in ten; None: none is."""


class Evidence(BaseModel):
    """Where a calibration comes from, and what it is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: int
    length: int
    """Tokens per window."""
    windows_sha256: str
    """Of the token ids."""
    seconds: float
    perplexity_exact: float | None = None
    """Of the unquantized model on held-out text."""
    perplexity: float | None = None
    """Of the same text read through the packed cache, 32 tokens a pass; None where windows were too short for that."""
    heldout_tokens: int = 0
    residual_length: int = 0
    """Newest tokens that the packed cache kept exact."""
    versions: dict[str, str] = {}


class LayerRecord(BaseModel):
    """A layer that was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: LayerSpec
    views: dict[Side, dict[str, Any]]
    """By side, what of its format the statistics depend on."""


class Record(BaseModel):
    """The JSON of a calibration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = FILE_VERSION
    strategy: str
    """Name of the strategy that was calibrated."""
    settings: dict[str, Any]
    """Its fields."""
    recipe: Recipe
    model: dict[str, Any]
    """`core.hf.identity.identify` of the model."""
    layers: dict[int, LayerRecord]
    evidence: Evidence
    numbers: str = ""
    """A hash of the tensors in the file beside."""


class Calibration:
    """What was learned from a text about one model: immutable, equal and hashed by content."""

    def __init__(
        self, record: Record, statistics: Mapping[int, Mapping[Side, Statistics]], source: str | None = None
    ) -> None:
        self.record = record
        self.statistics = {index: dict(sides) for index, sides in statistics.items()}
        self.source = source
        """The folder or hub id it was read from or saved to."""

    def of(self, layer: int, side: Side) -> Statistics:
        """Statistics of one side of one layer; raises ValueError if the calibration has none."""
        found = self.statistics.get(layer, {}).get(side)
        if found is None:
            raise ValueError(f"the calibration has no {side} statistics of layer {layer}; calibrate again")
        return found

    @cached_property
    def digest(self) -> str:
        """A hash of what strategies read, wherever it is kept and whatever the evidence for it."""
        # as it was before there were query norms: saved caches name their calibration by this
        unasked = {"recipe": {"query_quantile"}} if self.record.recipe.query_quantile is None else None
        record = self.record.model_dump_json(include={"recipe", "model", "layers"}, exclude=unasked)
        return hashlib.sha256((record + self._numbers_digest()).encode()).hexdigest()[:16]

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def _numbers_digest(self) -> str:
        content = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            content.update(name.encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Calibration({self.describe()!r})"

    def describe(self) -> str:
        """The place it can be loaded from, or what names it where it was never saved."""
        return self.source or f"unsaved-{self.digest}"

    def save(self, folder: str | os.PathLike[str]) -> Self:
        """Write the artifact into `folder`, each file replaced only when it is complete; returns it with its source."""
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        partial = path / (NUMBERS + ".partial")
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, partial)
        partial.chmod(0o644)  # safetensors writes for the owner's eyes only
        partial.replace(path / NUMBERS)
        partial = path / (RECORD + ".partial")
        record = self.record.model_copy(update={"numbers": self._numbers_digest()})
        partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path / RECORD)
        return type(self)(record, self.statistics, str(folder))

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Self:
        """Read an artifact from a folder, or from a repository of the Hugging Face hub.

        Raises FileNotFoundError where there is none, and ValueError for a damaged one or another file version.
        """
        folder = _folder(str(source))
        for name in (RECORD, NUMBERS):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{source} holds no calibration: {name} is missing")
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            version = record.get("version")
            found = None
            if version == FILE_VERSION:
                found = cls(Record.model_validate(record), _statistics(load_file(folder / NUMBERS)), str(source))
        except (SafetensorError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"the calibration in {source} is damaged ({error}); calibrate again") from error
        if found is None:
            raise ValueError(
                f"{source} has file version {version}, this cachequant reads version {FILE_VERSION}; calibrate again"
            )
        if found.record.numbers != found._numbers_digest():
            raise ValueError(
                f"the calibration in {source} is damaged: {NUMBERS} is not the one that {RECORD} was written with; "
                "calibrate again"
            )
        missing = [f"{side}s of layer {i}" for i, layer in found.record.layers.items() for side in layer.views
                   if side not in found.statistics.get(i, {})]  # fmt: skip
        if missing:
            raise ValueError(f"the calibration in {source} is damaged: it lacks the {missing[0]}; calibrate again")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{side}.{name}": tensor
            for index, sides in self.statistics.items()
            for side, statistics in sides.items()
            for name, tensor in statistics.tensors().items()
        }


def view(formats: LayerFormat | MixedFormat, side: Side) -> dict[str, Any]:
    """What of a side's format statistics depend on. Width and kind of the codes are chosen later.

    Nothing where every token has a width of its own: no ranges and densities are measured then.
    """
    if isinstance(formats, MixedFormat):
        return {}
    fmt: Format = getattr(formats, side)
    names = {"scale", "group", "symmetric", "rotation", "rope"} | ({"trim", "outliers"} if fmt.trim else set())
    # left out where it is the only one there was when calibrations began to be written
    names |= {"grid"} if fmt.grid != "ends" else set()
    seen = fmt.model_dump(mode="json", include=names)
    return {**seen, "block": formats.block} if fmt.trim or fmt.scale == "channel" else seen


def _statistics(tensors: dict[str, Tensor]) -> dict[int, dict[Side, Statistics]]:
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        index, side, name = key.split(".")
        found.setdefault(int(index), {}).setdefault(side, {})[name] = tensor
    return {
        index: {side: Statistics(**named) for side, named in sides.items()}  # type: ignore[misc]
        for index, sides in sorted(found.items())
    }


def _folder(source: str) -> Path:
    """The local folder of a source; a hub repository is downloaded, or found in the local cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no calibration folder {source!r}; give a folder that `cachequant calibrate` wrote, "
            "or a hub id, owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=[RECORD, NUMBERS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {source!r}, and the hub gave no calibration of that name: {error}"
        ) from error


def digest_of(windows: Tensor) -> str:
    """A hash of token ids."""
    return hashlib.sha256(windows.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
