"""What a benchmark task is: a question put to a model through a cache, and figures as the answer.

A task is a frozen pydantic model, like a strategy: its fields are its settings, and a spec such as
`passkey:length=512,samples=40` describes it. Plugins offer tasks through the hook `cachequant_tasks`.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from ...core import MemoryReport
from ..held import LayerBits, Memory

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel


class Metric(BaseModel):
    """A figure that a task gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    label: str
    better: Literal["higher", "lower"]
    digits: int = 4
    percent: bool = False
    unit: str = ""


class Outcome(BaseModel):
    """What a task found out about one contender on one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, float]
    directions: dict[str, Literal["higher", "lower"]] = {}
    """Which way those metrics are better that the task does not declare."""
    errors: dict[str, float] = {}
    """Standard errors of those metrics that are means over `samples`."""
    samples: tuple[dict[str, float | str | None], ...] = ()
    """One line per window, prompt or question, the same ones in the same order for every contender."""
    memory: Memory | None = None
    """What the cache held in the end."""
    kinds: dict[str, int] = {}
    """The bytes of that by kind."""
    layers: tuple[LayerBits, ...] = ()
    latency: dict[str, float] = {}
    """Milliseconds by what took them (and bytes where the name says so); not comparable between machines."""

    @classmethod
    def of(cls, held: tuple[MemoryReport, Memory] | None = None, **found: Any) -> Self:
        """From what `held.weigh` returned, and the other fields."""
        if held is None:
            return cls(**found)
        return cls(memory=held[1], kinds={name: size for name, size in held[0].rows.items() if size}, **found)


class Task(BaseModel):
    """Base of tasks. A subclass sets `name` and `metrics`, declares fields, and writes `prepare` and `measure`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    """The first is the one that tables rank by."""

    def fitted(self, panel: "Panel") -> Self:
        """The task with what its fields leave open decided for the model of `panel`, such as the length.

        Raises ValueError, saying what would do, where the task does not fit the model or the text.
        """
        return self

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """What the figures depend on besides model, strategy and fields: hashes of texts and files."""
        return {}

    def prepare(self, panel: "Panel") -> Any:
        """What all contenders share: prompts, the run of the exact model."""
        raise NotImplementedError(f"task {self.name!r} must define prepare(panel)")

    def measure(self, panel: "Panel", prepared: Any, contender: "Contender") -> Outcome:
        """One contender's figures, read through `contender.new_cache()`.

        Whatever it raises becomes a row with that reason. The model may be left attached.
        """
        raise NotImplementedError(f"task {self.name!r} must define measure(panel, prepared, contender)")
