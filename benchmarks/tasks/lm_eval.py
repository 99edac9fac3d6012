"""Any task of lm-evaluation-harness, or questions of a local file, with the packed cache really read."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from ...registry.hookspecs import hookimpl
from ..lm_eval.reading import Protocol
from .base import Metric, Outcome, Task

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..lm_eval.evaluation import Score
    from ..subjects import Panel


Line = dict[str, int | float | str | None]
"""Of predictions."""

# the filter that tasks of the harness lead with
STRICT = "strict-match"


class LmEval(Task):
    """A task of lm-evaluation-harness through the cache: its own metrics, and how much of what was read was packed."""

    name: ClassVar[str] = "lm-eval"
    # those of the harness that tasks use most; others are shown after them
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="acc", label="accuracy", better="higher", digits=1, percent=True),
        Metric(name="acc_norm", label="accuracy, normalised", better="higher", digits=1, percent=True),
        Metric(name="exact_match", label="exact match", better="higher", digits=1, percent=True),
        Metric(name="perplexity", label="perplexity", better="lower", digits=2),
        Metric(name="word_perplexity", label="word perplexity", better="lower", digits=2),
        Metric(name="byte_perplexity", label="byte perplexity", better="lower"),
        Metric(name="bits_per_byte", label="bits per byte", better="lower"),
        Metric(name="packed_share", label="read packed", better="higher", digits=0, percent=True),
    )

    task: str = Field(
        min_length=1, description="Name in the harness, or a .jsonl file of questions; see docs/lm-eval.md."
    )
    protocol: Protocol = Field(default="decode", description="How log-likelihoods are read; papers encode everything.")
    limit: int | None = Field(default=None, ge=1, description="Samples; None: all.")
    fewshot: int | None = Field(default=None, ge=0, description="Examples before each question; None: the task's own.")
    batch_size: int = Field(default=8, ge=1, description="Sequences at a time.")

    @property
    def file(self) -> Path | None:
        """The file of questions, if it is one."""
        return Path(self.task).expanduser() if self.task.endswith(".jsonl") else None

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`; finds out whether the harness and the file are there."""
        from ..lm_eval.harness import require_harness
        from ..lm_eval.local_tasks import local_task

        try:
            require_harness()
            if self.file is not None:
                local_task(self.file, limit=self.limit, fewshot=self.fewshot or 0)
        except (ImportError, OSError) as error:
            raise ValueError(str(error)) from error
        return self

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """See `Task.inputs`."""
        from importlib.metadata import version

        found = {"lm_eval": version("lm_eval")}
        if self.file is not None:
            found["questions_sha256"] = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return found

    def prepare(self, panel: "Panel") -> None:
        """The harness shares nothing between contenders."""

    def measure(self, panel: "Panel", prepared: None, contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        from ..lm_eval.evaluation import evaluate

        strategy = contender.strategy
        if strategy is None and self.protocol != "decode":
            raise ValueError(f"{contender.spec} cannot be simulated (protocol={self.protocol}); use protocol=decode")
        with warnings.catch_warnings():
            # that nothing was read packed is said by packed_share
            warnings.filterwarnings("ignore", "these scores are those of the exact model", UserWarning)
            found = evaluate(
                panel.model,
                panel.tokenizer,
                strategy if strategy is not None else lambda model: contender.new_cache(),
                [self.file or self.task],
                protocol=self.protocol,
                limit=self.limit,
                batch_size=self.batch_size,
                fewshot=self.fewshot,
                # in the papers' protocol nothing is kept exact
                options={"residual_length": panel.residual_length} if strategy and self.protocol != "paper" else None,
            )
        (reading,) = found.readings.values()
        named, declared = metrics_by_name(found.scores), {metric.name for metric in self.metrics}
        return Outcome(
            metrics={**{name: score.value for name, score in named.items()}, "packed_share": reading.packed_share},
            errors={name: score.stderr for name, score in named.items() if score.stderr is not None},
            directions={
                name: "higher" if score.higher_is_better else "lower"
                for name, score in named.items()
                if name not in declared
            },
            samples=leading_lines(found.predictions),
            memory=reading.memory,
        )


def metrics_by_name(scores: "Sequence[Score]") -> "dict[str, Score]":
    """Scores by the name of the metric, and of the task where there are several.

    Of a single task, the filter of answers is left out where it is the only one, or the strict one beside others.
    """
    if len({score.task for score in scores}) > 1:
        return {f"{score.task} {score.metric}": score for score in scores}
    filtered: dict[str, list[Score]] = {}
    for score in scores:
        filtered.setdefault(score.metric.partition(",")[0], []).append(score)
    named = {}
    for metric, variants in filtered.items():
        known = {score.metric: score for score in variants}
        leading = known.get(metric) or known.get(f"{metric},{STRICT}") or (variants[0] if len(variants) == 1 else None)
        named |= {metric if score is leading else score.metric: score for score in variants}
    return named


def leading_lines(predictions: Sequence[Line]) -> tuple[Line, ...]:
    """One line per question, not one per filter: of tasks with a strict filter, those of that."""
    strict = {line["task"] for line in predictions if line.get("filter") == STRICT}
    return tuple(line for line in predictions if line["task"] not in strict or line.get("filter") == STRICT)


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `lm-eval`."""
    return [LmEval]
