"""The figures of a paper as data: what it printed, where, how we know, and which of our strategies measures it again.

Facts, not measurements of ours: each names its table, and whether it was read in the paper or in another source.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FOLDER = Path(__file__).parent

Evidence = Literal["paper", "secondary"]
"""Read in the paper itself, or in something that quotes it."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperModel(_Data):
    """A model of the paper."""

    length: int = Field(ge=1, description="Tokens per window of its perplexity.")
    layers: int = Field(ge=1)
    channels: int = Field(ge=1, description="Of keys, all kv heads of a layer together; values have as many.")


class Row(_Data):
    """One method in one table."""

    name: str
    spec: str | None = None
    """What `registry.parse` turns into our strategy for it."""
    not_run: str | None = None
    """Why there is no spec."""
    differs: str | None = None
    """In what our strategy is not what the paper measured, beyond `Paper.differences`."""
    bits: tuple[float, float] | None = None
    """Average bits per number in the paper's accounting, least and most over models."""
    perplexity: tuple[float, ...]
    """By model, in the order of the table's."""

    @model_validator(mode="after")
    def _a_spec_or_a_reason(self) -> Self:
        if (self.spec is None) == (self.not_run is None):
            raise ValueError(f"row {self.name!r} needs either a spec or the reason why there is none")
        return self


class Table(_Data):
    """One table of the paper."""

    number: int
    title: str
    evidence: Evidence
    models: tuple[str, ...]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _a_figure_for_every_model(self) -> Self:
        for row in self.rows:
            if len(row.perplexity) != len(self.models):
                raise ValueError(f"row {row.name!r} has {len(row.perplexity)} figures for {len(self.models)} models")
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError(f"table {self.number} has two rows of one name")
        return self

    def figure(self, row: Row, model: str | None) -> float | None:
        """What the paper printed for a model, if it did."""
        return row.perplexity[self.models.index(model)] if model in self.models else None

    def orderings(self) -> list[tuple[str, str]]:
        """Pairs of rows, the first of which has the lower perplexity on every model of the table."""
        return [
            (a.name, b.name)
            for a in self.rows
            for b in self.rows
            if all(x < y for x, y in zip(a.perplexity, b.perplexity, strict=True))
        ]


class MemoryRow(_Data):
    """Size of the cache of one sequence."""

    model: str
    tokens: int
    evidence: Evidence
    note: str | None = None
    gib: tuple[float | None, ...]
    """By column; None where no figure was found."""


class MemoryTable(_Data):
    """The paper's accounting of bytes, and the sizes that it printed."""

    section: str
    evidence: Evidence
    vector_bits: int
    """Scale and zero point of a vector: a channel of all keys, or the values of a token."""
    outlier_bits: int
    """Value and index of an outlier."""
    pointer_bits: int
    """Per token and side, where there are outliers."""
    share: float
    """Of numbers that are outliers."""
    columns: tuple[tuple[int, bool], ...]
    """Bits, and whether there are outliers; 16 bits are not quantized."""
    rows: tuple[MemoryRow, ...]

    def bits(self, bits: int, outliers: bool, tokens: int, channels: int) -> float:
        """Bits per number, keys and values averaged, of `tokens` tokens in a layer of `channels` channels."""
        if bits == 16:
            return 16.0
        vectors = (self.vector_bits / tokens + self.vector_bits / channels) / 2
        sparse = self.share * self.outlier_bits + self.pointer_bits / channels if outliers else 0.0
        return bits + vectors + sparse

    def gib(self, bits: int, outliers: bool, tokens: int, model: PaperModel) -> float:
        """Size of the cache of one sequence."""
        numbers = 2 * model.layers * model.channels * tokens
        return numbers * self.bits(bits, outliers, tokens, model.channels) / 8 / 2**30


class CalibrationCost(_Data):
    """How long a step of the calibration took."""

    table: int
    model: str
    step: str
    minutes: float
    hardware: str
    evidence: Evidence
    hardware_evidence: Evidence


class Paper(_Data):
    """All figures of one paper that we compare with."""

    title: str
    source: str
    models: dict[str, PaperModel]
    differences: tuple[str, ...]
    """In what all our rows are not what the paper measured."""
    tables: tuple[Table, ...]
    memory: MemoryTable
    calibration: tuple[CalibrationCost, ...]

    @model_validator(mode="after")
    def _models_are_described(self) -> Self:
        named = {name for table in self.tables for name in table.models} | {row.model for row in self.memory.rows}
        if missing := named - self.models.keys():
            raise ValueError(f"models {sorted(missing)} have figures and no description")
        for row in self.memory.rows:
            if len(row.gib) != len(self.memory.columns):
                raise ValueError(f"the sizes of {row.model} do not match the columns")
        return self


def load(name: str) -> Paper:
    """The figures in `<name>.json` beside this module."""
    return Paper.model_validate_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
