"""What is measured to answer QAQ's questions, and the answers."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from .... import registry
from ....core import MemoryReport
from ....strategies.qaq import QAQ as Strategy
from ...held import UNPACKED_ROWS
from ...leaderboard import Leaderboard, Row
from .curves import Advantage, Comparison, Compressed, Curve, Point, advantage, compare, compressed, curve
from .figures import Geometry, average_bits, repository_ratio

QAQ, DROPPING = "qaq", "drops tokens"
EVICTIONS = ("h2o", "scissorhands")
OTHERS = (*EVICTIONS, "uniform")

SIDES: dict[str, dict[str, object]] = {
    QAQ: {},
    "no outliers": {"alpha": 0},
    "window 1": {"window": 1},
    "shared bits": {"shared_bits": "true"},
    "no host copy": {"host_copy": "false"},
    DROPPING: {"min_bits": 0},
}
"""What each curve of QAQ changes."""

TARGETS = (0.0005, 0.002, 0.008, 0.03, 0.1)
VALUE_TARGET = 50.0
"""`sigma_value` as a multiple of `sigma_key`, both at their defaults; at most 1."""
KEEPS = (0.9, 0.7, 0.5, 0.35, 0.2, 0.1)
WIDTHS = (8, 4, 3, 2)
DIVERGENCES = (0.01, 0.03, 0.1, 0.3)

Size = Literal["packed", "held", "paper"]
"""Bits of the packed part, bits of all that is held, or bits by the accounting of the paper's code."""


class Question(NamedTuple):
    """An ablation: the curve the paper recommends, and the one without."""

    title: str
    better: str
    worse: str
    table: int | None = None


QUESTIONS = (
    Question("Outliers: 1 % exact instead of none", QAQ, "no outliers", 2),
    Question("Attention window: 5 queries instead of 1", QAQ, "window 1", 3),
    Question("Bits: keys and values apart instead of the same", QAQ, "shared bits"),
    Question("Host copy: tokens may become wider again instead of narrower only", QAQ, "no host copy"),
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parts(_Record):
    """What the packed bits of a row consist of, per number."""

    codes: float
    exact: float
    """Rows of 16 bits."""
    scales: float
    outliers: float
    """Values and indices."""
    widths: float
    """Tags of tokens, and what decisions need to know about them."""

    @property
    def metadata(self) -> float:
        """All but codes and exact rows."""
        return self.scales + self.outliers + self.widths


class Line(_Record):
    """One setting on one model."""

    curve: str
    setting: str
    row: Row
    parts: Parts | None = None
    average: float | None = None
    """Bits per number by the paper's accounting, without scales."""
    paper_ratio: float | None = None
    """Compression that the repository would report; of QAQ only."""

    def bits(self, size: Size) -> float | None:
        """Its size."""
        if self.row.memory is None:
            return None
        if size == "paper":
            return self.paper_ratio and 16 / self.paper_ratio
        return self.row.memory.packed_bits_per_element if size == "packed" else self.row.memory.bits_per_element


class Answer(_Record):
    """An ablation on one model."""

    panel: str
    question: str
    packed: Comparison
    paper: Comparison
    """The same with sizes by the paper's accounting."""


class Equal(_Record):
    """All methods at one divergence on one model."""

    panel: str
    size: Size
    kl: float
    compressed: dict[str, Compressed]
    keeping: Advantage
    """Of QAQ over the best eviction."""
    dropping: Advantage
    """The same where QAQ may drop tokens itself."""


class Result(_Record):
    """All that was measured, with its conditions."""

    title: str
    source: str
    board: Leaderboard
    """Without rows, which are in the lines."""
    shapes: dict[str, Geometry]
    """By model."""
    divergences: tuple[float, ...]
    lines: tuple[Line, ...] = ()
    answers: tuple[Answer, ...] = ()
    equal: tuple[Equal, ...] = ()

    def with_line(self, line: Line) -> "Result":
        """One more, and all answers anew."""
        lines = (*self.lines, line)
        panels = list(dict.fromkeys(each.row.panel for each in lines))
        found = {panel: [each for each in lines if each.row.panel == panel] for panel in panels}
        return self.model_copy(
            update={
                "lines": lines,
                "answers": tuple(answer for panel in panels for answer in answers(panel, found[panel])),
                "equal": tuple(each for panel in panels for each in at_equal(panel, found[panel], self.divergences)),
            }
        )


def plan(targets: Iterable[float] = TARGETS, keeps: Iterable[float] = KEEPS) -> dict[str, dict[str, str]]:
    """Specs by curve and setting.

    Raises what `registry.parse` raises.
    """
    found: dict[str, dict[str, str]] = {}
    for name, changes in SIDES.items():
        settings = {f"target {target:g}": {**_targets(target), **changes} for target in targets}
        found[name] = {setting: _spec("qaq", fields) for setting, fields in settings.items()}
    for name in EVICTIONS:
        found[name] = {f"keep {keep:g}": _spec(name, {"keep": keep}) for keep in keeps}
    found["uniform"] = {f"{bits} bits": _spec("uniform", {"bits": bits}) for bits in WIDTHS}
    return found


def line(curve: str, setting: str, row: Row, report: MemoryReport | None, shape: Geometry) -> Line:
    """A measured row with what its bytes are, by our accounting and the paper's."""
    if row.memory is None or report is None:
        return Line(curve=curve, setting=setting, row=row)
    parts = parts_of(report)
    strategy = registry.parse(row.strategy)
    if not isinstance(strategy, Strategy):
        return Line(curve=curve, setting=setting, row=row, parts=parts)
    average = average_bits(parts.codes + parts.exact, strategy.alpha)
    ratio = repository_ratio(average, strategy.granularity, shape)
    return Line(curve=curve, setting=setting, row=row, parts=parts, average=average, paper_ratio=ratio)


def parts_of(report: MemoryReport) -> Parts:
    """Bits per number of the packed part, kind by kind; they add up to the packed bits."""
    unpacked = sum(report.rows.get(name, 0) for name in ("tail", "sinks"))
    packed = report.elements * (1 - unpacked / report.exact_bytes)
    names = {"codes": "codes", "exact": "exact", "scales": "scales", "outliers": "outliers"}
    sizes = dict.fromkeys([*names, "widths"], 0.0)
    for name, size in report.rows.items():
        if name not in UNPACKED_ROWS and packed > 0:
            sizes[names.get(name.rpartition(" ")[2], "widths")] += 8 * size / packed
    return Parts(**sizes)


def curve_of(lines: Sequence[Line], name: str, size: Size = "packed") -> Curve:
    """The measured points of a curve."""
    sized = [(each.row.accuracy, each.bits(size)) for each in lines if each.curve == name]
    return curve(Point(accuracy.kl_mean, bits) for accuracy, bits in sized if accuracy and bits is not None)


def answers(panel: str, lines: Sequence[Line]) -> list[Answer]:
    """All ablations of which both sides have been measured."""
    measured = {each.curve for each in lines}
    return [
        Answer(
            panel=panel,
            question=question.title,
            packed=compare(curve_of(lines, question.better), curve_of(lines, question.worse)),
            paper=compare(curve_of(lines, question.better, "paper"), curve_of(lines, question.worse, "paper")),
        )
        for question in QUESTIONS
        if {question.better, question.worse} <= measured
    ]


def at_equal(panel: str, lines: Sequence[Line], divergences: Iterable[float]) -> list[Equal]:
    """Compression at each divergence, once all methods have been measured."""
    names = (QAQ, DROPPING, *OTHERS)
    if not {*names} <= {each.curve for each in lines}:
        return []
    sizes: tuple[Size, ...] = ("packed", "held")
    found = []
    for size in sizes:
        curves = {name: curve_of(lines, name, size) for name in names}
        for kl in divergences:
            ratios = {name: compressed(curves[name], kl) for name in names}
            evictions = {name: ratios[name] for name in EVICTIONS}
            found.append(
                Equal(
                    panel=panel,
                    size=size,
                    kl=kl,
                    compressed=ratios,
                    keeping=advantage(ratios[QAQ], evictions),
                    dropping=advantage(ratios[DROPPING], evictions),
                )
            )
    return found


def _targets(target: float) -> dict[str, object]:
    return {"sigma_key": target, "sigma_value": min(1.0, round(VALUE_TARGET * target, 12))}


def _spec(name: str, fields: dict[str, object]) -> str:
    text = ",".join(f"{field}={value}" for field, value in fields.items())
    return registry.spec(registry.parse(f"{name}:{text}"))
