"""A paper's sizes of caches beside ours, and what each difference is made of."""

from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ... import registry
from ...core import CacheQuantizer
from ..papers.figures import MemoryTable, PaperModel, load
from .formula import CacheFormula, Setting, formula, stock_formula
from .planning import categories_of
from .shapes import read_config, shape_of

PAPERS = ("kvquant",)

MODELS = {"LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "LLaMA-30B": "llama-30b", "LLaMA-65B": "llama-65b"}
"""Of the paper, and what they are called in `shapes.NAMED`."""

LENGTHS = (2**17, 2**20, 10 * 2**20)
"""128K, 1M and 10M tokens, as the paper counts them."""

GIB = 2**30

REASONS = {
    "codes": "as many bits; ours none for the tokens of the exact tail",
    "scales": "ours: a scale and a zero per value token and head, the paper's one pair for all heads of a layer; keys' "
    "are of a calibration in both",
    "outliers": "ours: as many slots in every row, 1 % of 128 rounded up to 2, and no pointers; the paper's as many as "
    "there are, and a pointer per token",
    "rope tables": "keys are kept before RoPE in both: ours reads cosines and sines, the paper's kernels compute them",
    "exact tail": "ours keeps the newest 128 to 255 tokens exact",
    "sinks": "ours keeps the first token exact beside its codes; the paper does too, and does not count it",
    "codebooks": "once per layer and side; the paper does not count them",
    "spare": "room that the tail was allocated with",
}
"""Why a part of ours has not the size of the paper's."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Data):
    """One size: of one model, length and setting."""

    model: str
    tokens: int
    bits: int
    outliers: bool
    printed: float | None
    """GiB that the paper prints, where it does."""
    evidence: Literal["paper", "secondary"] | None
    paper: float
    """GiB by the paper's accounting."""
    ours: float
    """GiB that our cache holds after a prompt of that length."""
    difference: dict[str, float]
    """Ours less the paper's, in bits per cached number, by what the bits are for."""

    @property
    def ratio(self) -> float:
        """Ours over the paper's accounting."""
        return self.ours / self.paper


class Comparison(_Data):
    """A paper's table beside ours."""

    title: str
    source: str
    specs: dict[str, str]
    """Our strategies by the paper's names."""
    cells: tuple[Cell, ...]
    reasons: dict[str, str]
    notes: tuple[str, ...]

    def cell(self, model: str, tokens: int, bits: int, outliers: bool) -> Cell:
        """One of them; raises KeyError if there is none."""
        for each in self.cells:
            if (each.model, each.tokens, each.bits, each.outliers) == (model, tokens, bits, outliers):
                return each
        raise KeyError((model, tokens, bits, outliers))


def column_name(bits: int, outliers: bool) -> str:
    """The paper's name of a setting."""
    return "fp16" if bits == 16 else f"nuq{bits}{'-1%' if outliers else ''}"


@cache
def compare(name: str) -> Comparison:
    """The sizes of caches of one sequence that a paper states, its accounting and ours, of one of `PAPERS`."""
    paper = load(name)
    strategies = {column: _strategy(*column) for column in paper.memory.columns}
    specs = {
        column_name(*column): "DynamicCache" if strategy is None else registry.spec(strategy)
        for column, strategy in strategies.items()
    }
    cells = []
    for model, shape_name in MODELS.items():
        shape = shape_of(*read_config(shape_name), "float16")
        for tokens in LENGTHS:
            for column, strategy in strategies.items():
                found = stock_formula(shape, Setting()) if strategy is None else formula(strategy, shape, Setting())
                cells.append(_cell(paper.memory, paper.models[model], model, tokens, column, found))
    return Comparison(
        title=paper.title,
        source=paper.source,
        specs=specs,
        cells=tuple(cells),
        reasons=REASONS,
        notes=tuple(f"{row.model}, {row.tokens:,} tokens: {row.note}" for row in paper.memory.rows if row.note),
    )


def _strategy(bits: int, outliers: bool) -> CacheQuantizer | None:
    if bits == 16:
        return None
    return registry.get("kvquant")(bits=bits, **({} if outliers else {"outliers": 0}))


def _cell(
    table: MemoryTable, model: PaperModel, name: str, tokens: int, column: tuple[int, bool], found: CacheFormula
) -> Cell:
    rows = found.held(tokens)
    elements = found.elements(tokens)
    ours = {kind: 8 * count / elements for kind, count in categories_of(rows).items()}
    theirs = _paper_parts(table, column, tokens, model.channels)
    printed = next((row for row in table.rows if (row.model, row.tokens) == (name, tokens)), None)
    figure = None if printed is None else printed.gib[table.columns.index(column)]
    return Cell(
        model=name,
        tokens=tokens,
        bits=column[0],
        outliers=column[1],
        printed=figure,
        evidence=None if printed is None or figure is None else printed.evidence,
        paper=table.gib(*column, tokens, model),
        ours=sum(rows.values()) / GIB,
        difference={kind: ours.get(kind, 0.0) - theirs.get(kind, 0.0) for kind in {**theirs, **ours}},
    )


def _paper_parts(table: MemoryTable, column: tuple[int, bool], tokens: int, channels: int) -> dict[str, float]:
    """The paper's accounting by part, in bits per number."""
    bits, outliers = column
    if bits == 16:
        return {"exact layers": 16.0}
    whole = table.bits(bits, outliers, tokens, channels)
    dense = table.bits(bits, False, tokens, channels)
    return {"codes": float(bits), "scales": dense - bits, **({"outliers": whole - dense} if outliers else {})}
