"""Pass keys: numbers hidden in a text, which the model is asked to repeat; see `benchmarks.passkey`."""

import random
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from ...registry.hookspecs import hookimpl
from ..held import bits_by_layer, weigh
from ..passkey import KEY_DIGITS, TAIL_TOKENS, PasskeyPrompt, passkey_answers, passkey_prompt
from .base import Metric, Outcome, Task
from .reading import (
    PACKED,
    fresh_cache,
    mean,
    packed_share,
    prefilled_alone,
    require_length,
    rows_at_once,
    spread,
    standard_errors,
)

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel

LENGTH = 512


class Passkey(Task):
    """A number hidden in a text: share of prompts whose answer, decoded greedily, repeats it in full."""

    name: ClassVar[str] = "passkey"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="accuracy", label="keys", better="higher", digits=1, percent=True),
        Metric(name="digits", label="digits", better="higher", digits=1, percent=True),
        PACKED,
    )

    length: int | None = Field(
        default=None, ge=2, description=f"Tokens of prompt and answer; None: {LENGTH}, if the model takes them."
    )
    depths: int = Field(default=5, ge=1, description="Places to hide at, from the beginning of the text to its end.")
    samples: int = Field(default=20, ge=1, description="Prompts, which take turns at the depths.")
    batch_size: int = Field(
        default=10, ge=1, description="Prompts per forward pass, where rows do not influence another."
    )
    seed: int = Field(default=0, description="Of the keys and the texts around them.")

    @model_validator(mode="after")
    def _every_depth_is_sampled(self) -> Self:
        if self.samples < self.depths:
            raise ValueError(f"samples={self.samples} leave some of depths={self.depths} out; use at least as many")
        return self

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`."""
        length = min(LENGTH, panel.card.context) if self.length is None else self.length
        require_length(length, panel.card.context, 2, "a prompt")
        passkey_prompt(panel.tokenizer, panel.ids, length, rng=random.Random(self.seed))  # raises where it does not fit
        return self.model_copy(update={"length": length})

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """See `Task.inputs`."""
        return {"text": panel.text.name, "text_sha256": panel.text.sha256}

    def prepare(self, panel: "Panel") -> list[PasskeyPrompt]:
        """The prompts."""
        length = self.fitted(panel).length
        assert length is not None  # a fitted task has one
        rng, places = random.Random(self.seed), spread(self.depths)
        return [
            passkey_prompt(panel.tokenizer, panel.ids, length, places[i % self.depths], rng)
            for i in range(self.samples)
        ]

    def measure(self, panel: "Panel", prepared: list[PasskeyPrompt], contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        length = float(self.fitted(panel).length or 0)
        rows = rows_at_once(contender, self.batch_size)
        samples, cache = [], None
        for start in range(0, len(prepared), rows):
            cache, batch = fresh_cache(contender), prepared[start : start + rows]
            answers = passkey_answers(panel.model, panel.tokenizer, batch, cache)
            for prompt, answer in zip(batch, answers, strict=True):
                samples.append(
                    {
                        "sample": float(len(samples)),
                        "depth": prompt.depth,
                        "length": length,
                        "key": prompt.key,
                        "answer": answer,
                        "accuracy": float(answer.startswith(prompt.key)),
                        "digits": sum(map(str.__eq__, prompt.key, answer)) / KEY_DIGITS,
                    }
                )
        assert cache is not None  # there is at least one prompt
        figures = ("accuracy", "digits")
        alone = prefilled_alone(contender, prepared[0].ids[:-TAIL_TOKENS])
        return Outcome.of(
            weigh(alone, panel.model, 1),
            metrics={**{name: mean(samples, name) for name in figures}, PACKED.name: packed_share(cache)},
            errors=standard_errors(samples, figures),
            samples=tuple(samples),
            layers=bits_by_layer(alone),
        )


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `passkey`."""
    return [Passkey]
