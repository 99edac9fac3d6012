"""What QAQ's paper printed, as data, and the accounting of bytes in its authors' code."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..figures import FOLDER, Evidence

Level = Literal["token", "layer", "head"]
LEVELS: tuple[Level, ...] = ("token", "layer", "head")
Pair = tuple[float, float]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Geometry(_Data):
    """The shape of a model's cache."""

    layers: int = Field(ge=1)
    channels: int = Field(ge=1, description="Of keys, all kv heads of a layer together; values have as many.")
    heads: int = Field(ge=1, description="That have keys.")


class Compression(_Data):
    """How many times smaller, at hardly any loss, than 16 bits and than others."""

    table: int
    title: str
    evidence: Evidence
    ratios: dict[str, tuple[float, ...]]
    """By model; one per task."""
    compared: dict[str, Pair]
    """Least and most of other methods, quoted there from their papers."""
    over_compared: Pair
    """How many times more than the best of these, least and most."""
    most: float
    """The largest that is claimed."""


class AblationRow(_Data):
    """A model and task on both sides."""

    model: str
    task: str
    accuracy: Pair
    ratio: Pair


class Ablation(_Data):
    """One field at two values; the paper recommends the second."""

    table: int
    title: str
    evidence: Evidence
    sides: tuple[str, str]
    rows: tuple[AblationRow, ...]

    def summary(self) -> str:
        """What the second value gains and costs, over all rows."""
        gains = [100 * (row.accuracy[1] - row.accuracy[0]) for row in self.rows]
        costs = [100 * (1 - row.ratio[1] / row.ratio[0]) for row in self.rows]
        return (
            f"{self.sides[1]} instead of {self.sides[0]}: accuracy {min(gains):+.1f} to {max(gains):+.1f} points, "
            f"compression {min(costs):.1f} to {max(costs):.1f} % less"
        )


class OneSide(_Data):
    """Keys or values alone at few bits."""

    figure: str
    title: str
    evidence: Evidence
    note: str
    model: str
    task: str
    bits: tuple[int, ...]
    keys: tuple[float, ...]
    values: tuple[float, ...]
    exact: float


class Paper(_Data):
    """All figures that we compare with."""

    title: str
    source: str
    models: dict[str, Geometry]
    tasks: tuple[str, ...]
    differences: tuple[str, ...]
    """In what our measurement is not the paper's."""
    compression: Compression
    ablations: tuple[Ablation, ...]
    one_side: OneSide

    @model_validator(mode="after")
    def _models_and_tasks_are_described(self) -> Self:
        rows = [row for ablation in self.ablations for row in ablation.rows]
        named = {row.model for row in rows} | self.compression.ratios.keys() | {self.one_side.model}
        if missing := named - self.models.keys():
            raise ValueError(f"models {sorted(missing)} have figures and no description")
        if missing := {self.one_side.task, *(row.task for row in rows)} - set(self.tasks):
            raise ValueError(f"tasks {sorted(missing)} have figures and are not listed")
        if any(len(ratios) != len(self.tasks) for ratios in self.compression.ratios.values()):
            raise ValueError(f"the ratios of table {self.compression.table} do not match the tasks")
        return self

    def ablation(self, table: int | None) -> Ablation | None:
        """The ablation of a table."""
        return next((each for each in self.ablations if each.table == table), None)


def load() -> Paper:
    """The figures in `qaq.json`."""
    return Paper.model_validate_json((FOLDER / "qaq.json").read_text(encoding="utf-8"))


# ---- the accounting of the authors' code: no indices, no tags of widths, no copies --------------------------------


def average_bits(bits: float, alpha: float) -> float:
    """Bits per number, where codes take `bits` on average and a share `alpha` of numbers 16 instead."""
    return bits * (1 - alpha) + 16 * alpha


def repository_ratio(average: float, level: Level, shape: Geometry, *, symmetric: bool = False) -> float:
    """How many times smaller than 16 bits: codes, outliers, and a scale (and mean) per token and what `level` says."""
    numbers = shape.layers * shape.channels
    sharing = {"token": 1, "layer": shape.layers, "head": shape.layers * shape.heads}[level]
    return 16 * numbers / (average * numbers + 16 * (1 if symmetric else 2) * sharing)
