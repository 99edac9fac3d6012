"""Needle: random tokens hidden in a text, and how well a model continues them when it is given the first few again.

Any model that copies from its context can be asked, whatever it was trained to answer; a score per token tells caches
apart long before whole answers fail.
"""

import random
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from ...registry.hookspecs import hookimpl
from ..held import bits_by_layer, weigh
from .base import Metric, Outcome, Task
from .endings import EndingRun, Item
from .reading import PACKED, mean, prefilled_alone, require_length, spread, standard_errors

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel

LENGTH = 512


class Prepared(NamedTuple):
    """What all contenders share."""

    run: EndingRun
    depths: list[float]
    """Of each sample."""


class Needle(Task):
    """Random tokens hidden in a text and begun again at its end: share of their continuation that is recalled."""

    name: ClassVar[str] = "needle"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="recall", label="recall", better="higher", digits=1, percent=True),
        Metric(name="nll", label="NLL", better="lower", digits=3, unit="nats"),
        Metric(name="kl", label="KL", better="lower", unit="nats"),
        PACKED,
    )

    length: int | None = Field(
        default=None, ge=2, description=f"Tokens of the prompt and the answer; None: {LENGTH}, if the model takes them."
    )
    depths: int = Field(default=5, ge=1, description="Places to hide at, from the beginning of the text to its end.")
    samples: int = Field(default=20, ge=1, description="Prompts, which take turns at the depths.")
    span: int = Field(default=32, ge=2, description="Random tokens that are hidden.")
    cue: int = Field(default=8, ge=1, description="How many of them the end of the prompt repeats; the rest is scored.")
    batch_size: int = Field(
        default=10, ge=1, description="Prompts per forward pass, where rows do not influence another."
    )
    seed: int = Field(default=0, description="Of the hidden tokens and the texts around them.")

    @model_validator(mode="after")
    def _something_is_scored(self) -> Self:
        if self.cue >= self.span:
            raise ValueError(f"cue={self.cue} leaves nothing of span={self.span} to score; use at most {self.span - 1}")
        if self.samples < self.depths:
            raise ValueError(f"samples={self.samples} leave some of depths={self.depths} out; use at least as many")
        return self

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`."""
        length = min(LENGTH, panel.card.context) if self.length is None else self.length
        least = 2 * self.span + len(_start(panel)) + 1
        require_length(length, panel.card.context, least, f"hiding span={self.span} and asking for it")
        if len(panel.ids) < length:
            raise ValueError(
                f"the text has {len(panel.ids)} tokens, length={length}; use a longer text or a smaller length"
            )
        return self.model_copy(update={"length": length})

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """See `Task.inputs`."""
        return {"text": panel.text.name, "text_sha256": panel.text.sha256}

    def prepare(self, panel: "Panel") -> Prepared:
        """The prompts, and the exact model's predictions."""
        task = self.fitted(panel)
        rng = random.Random(self.seed)
        places = spread(self.depths)
        depths = [places[i % self.depths] for i in range(self.samples)]
        # tokens that the text uses: none that controls the model, none that it never saw
        known = sorted(set(panel.ids))
        items = [task._item(panel, known, depth, rng) for depth in depths]
        return Prepared(EndingRun(panel.model, items, self.batch_size), depths)

    def measure(self, panel: "Panel", prepared: Prepared, contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        length = self.fitted(panel).length
        scored = prepared.run.score(contender)
        cache = prefilled_alone(contender, prepared.run.first)
        samples = tuple(
            {
                "sample": float(number),
                "depth": depth,
                "length": float(length or 0),
                "recall": score.recall,
                "nll": score.loss / score.tokens,
                "kl": score.divergence,
            }
            for number, (depth, (score,)) in enumerate(zip(prepared.depths, scored.endings, strict=True))
        )
        figures = ("recall", "nll", "kl")
        return Outcome.of(
            weigh(cache, panel.model, 1),
            metrics={**{name: mean(samples, name) for name in figures}, PACKED.name: scored.packed},
            errors=standard_errors(samples, figures),
            samples=samples,
            layers=bits_by_layer(cache),
        )

    def _item(self, panel: "Panel", known: list[int], depth: float, rng: random.Random) -> Item:
        """Filler that hides the span at `depth`, its first tokens again, and the rest as the ending."""
        assert self.length is not None  # a fitted task has one
        span = [rng.choice(known) for _ in range(self.span)]
        start = _start(panel)
        room = self.length - len(start) - 2 * self.span
        offset = rng.randint(0, len(panel.ids) - room)
        text = list(panel.ids[offset : offset + room])
        cut = round(depth * room)
        context = (*start, *text[:cut], *span, *text[cut:], *span[: self.cue])
        # the cue is fed after the prefill: what reads it finds the span as it is stored
        return Item(context, (tuple(span[self.cue :]),), after=self.cue)


def _start(panel: "Panel") -> list[int]:
    bos = panel.tokenizer.bos_token_id
    return [] if bos is None else [bos]


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `needle`."""
    return [Needle]
