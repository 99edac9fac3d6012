"""Continuation: multiple-choice questions answered by log-likelihood, through the cache.

The context is prefilled, and every choice is scored by tokens that are fed after it. Solved examples make contexts so
long that what is read is packed: a question alone mostly fits into the exact tail, and would test nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from ...registry.hookspecs import hookimpl
from ..held import bits_by_layer, weigh
from .base import Metric, Outcome, Task
from .endings import EndingRun, EndingScore
from .questions import SHORTEST, STRETCH, FileQuestions, Question, hash_of, recollections
from .reading import PACKED, mean, prefilled_alone, require_length, standard_errors

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel

LENGTH = 512


class Prepared(NamedTuple):
    """What all contenders share."""

    run: EndingRun
    questions: list[Question]


class Continuation(Task):
    """Multiple choice by log-likelihood: questions of a file, or what came next in a passage that is begun again."""

    name: ClassVar[str] = "continuation"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="accuracy", label="right", better="higher", digits=1, percent=True),
        Metric(name="accuracy_bytes", label="right per byte", better="higher", digits=1, percent=True),
        Metric(name="agreement", label="as exact", better="higher", digits=1, percent=True),
        Metric(name="kl", label="KL", better="lower", unit="nats"),
        PACKED,
    )

    file: Path | None = Field(
        default=None, description="JSON lines of query, choices and gold; None: the text is asked about."
    )
    length: int | None = Field(
        default=None,
        ge=2,
        description=f"Tokens before the choices, filled with solved examples; None: {LENGTH}, if the model takes them.",
    )
    shots: int | None = Field(
        default=None, ge=0, description="Solved examples before each question of a file, in place of a length."
    )
    samples: int = Field(default=20, ge=1, description="Questions.")
    batch_size: int = Field(
        default=8, ge=1, description="Questions per forward pass, where rows do not influence another."
    )
    seed: int = Field(default=0, description="Of the questions that are drawn, and of wrong choices.")

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.shots is not None and self.file is None:
            raise ValueError(f"shots={self.shots} are examples from a file; give one, or a length")
        if self.shots is not None and self.length is not None:
            raise ValueError(f"shots={self.shots} and length={self.length} both say how long contexts are; give one")
        return self

    @property
    def fixes_length(self) -> bool:
        """Whether contexts are as long as their examples make them: a sweep over lengths leaves this task alone."""
        return self.shots is not None

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`."""
        context = panel.card.context
        if self.shots is not None:
            longest = max(_positions(question) for question in self._questions(panel))
            if longest > context:
                raise ValueError(
                    f"the longest question takes {longest} tokens with shots={self.shots} examples, "
                    f"the model {context}; use fewer shots"
                )
            return self
        ending = STRETCH if self.file is None else FileQuestions(*self._drawn(panel)).longest_ending
        length = min(LENGTH, context - ending) if self.length is None else self.length
        require_length(length, context - ending, SHORTEST if self.file is None else 2, "a passage with four choices")
        fitted = self.model_copy(update={"length": length})
        fitted._questions(panel)  # raises where the file or the text is too short
        return fitted

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """See `Task.inputs`."""
        if self.file is None:
            return {"text": panel.text.name, "text_sha256": panel.text.sha256}
        return {"file": self.file.name, "file_sha256": hash_of(self.file)}

    def prepare(self, panel: "Panel") -> Prepared:
        """The questions, and the exact model's predictions."""
        questions = self.fitted(panel)._questions(panel)
        run = EndingRun(panel.model, [question.item for question in questions], self.batch_size)
        return Prepared(run, questions)

    def measure(self, panel: "Panel", prepared: Prepared, contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        scored = prepared.run.score(contender)
        cache = prefilled_alone(contender, prepared.run.first)
        samples = tuple(
            _sample(number, question, endings, exact)
            for number, (question, endings, exact) in enumerate(
                zip(prepared.questions, scored.endings, prepared.run.exact, strict=True)
            )
        )
        figures = ("accuracy", "accuracy_bytes", "agreement", "kl")
        return Outcome.of(
            weigh(cache, panel.model, 1),
            metrics={**{name: mean(samples, name) for name in figures}, PACKED.name: scored.packed},
            errors=standard_errors(samples, figures),
            samples=samples,
            layers=bits_by_layer(cache),
        )

    def _questions(self, panel: "Panel") -> list[Question]:
        if self.shots is not None:
            return FileQuestions(*self._drawn(panel)).after(self.shots)
        assert self.length is not None  # a fitted task has one
        if self.file is not None:
            return FileQuestions(*self._drawn(panel)).filled(self.length)
        return recollections(panel.tokenizer, panel.ids, self.samples, self.length, self.seed)

    def _drawn(self, panel: "Panel") -> tuple[object, Path, int, int]:
        assert self.file is not None  # asked of files alone
        return panel.tokenizer, self.file, self.samples, self.seed


def _positions(question: Question) -> int:
    return len(question.item.context) + max(map(len, question.item.endings))


def _sample(
    number: int, question: Question, endings: list[EndingScore], exact: list[EndingScore]
) -> dict[str, float | str | None]:
    choice = _likeliest([ending.loss for ending in endings])
    by_bytes = _likeliest([ending.loss / size for ending, size in zip(endings, question.sizes, strict=True)])
    expected = _likeliest([ending.loss for ending in exact])
    tokens = sum(ending.tokens for ending in endings)
    return {
        "sample": float(number),
        "place": question.place,
        "length": float(len(question.item.context)),
        "gold": float(question.gold),
        "choice": float(choice),
        "exact_choice": float(expected),
        "accuracy": float(choice == question.gold),
        "accuracy_bytes": float(by_bytes == question.gold),
        "agreement": float(choice == expected),
        "loss": endings[question.gold].loss,
        "kl": sum(ending.divergence * ending.tokens for ending in endings) / tokens,
    }


def _likeliest(losses: list[float]) -> int:
    """The first of the smallest."""
    return losses.index(min(losses))


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `continuation`."""
    return [Continuation]
