"""Perplexity, and divergence from the exact model, on any text: streamed through the cache."""

import math
import statistics
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field
from torch import Tensor
from transformers import DynamicCache

from ...core import detach
from ...registry.hookspecs import hookimpl
from ..held import bits_by_layer, weigh
from ..metrics import summarize
from ..streaming import ExactRun, Protocol, cut_windows
from .base import Metric, Outcome, Task

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel


# as in `metrics.summarize`
LARGEST_LOSS = 700.0


class Perplexity(Task):
    """Text continued chunk by chunk through the cache: perplexity, KL to the exact model, top-1 agreement."""

    name: ClassVar[str] = "perplexity"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="kl_mean", label="KL mean", better="lower", unit="nats"),
        Metric(name="kl_p99", label="KL p99", better="lower", unit="nats"),
        Metric(name="top1", label="top-1", better="higher", digits=1, percent=True),
        Metric(name="perplexity", label="perplexity", better="lower", digits=2),
    )

    length: int | None = Field(
        default=None, ge=2, description="Tokens per window; None: 1024 beyond the residual, if the model takes them."
    )
    windows: int = Field(default=4, ge=1, description="Stretches of text, evaluated as one batch.")

    def protocol(self, panel: "Panel") -> Protocol:
        """The steps in which the text is read. Raises ValueError where the model takes no such length."""
        return Protocol.fitting(panel.card.context, self.windows, self.length, panel.residual_length)

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`."""
        protocol = self.protocol(panel)
        self._cut(panel, protocol)
        return self.model_copy(update={"length": protocol.length})

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """See `Task.inputs`."""
        return {"text": panel.text.name, "text_sha256": panel.text.sha256}

    def prepare(self, panel: "Panel") -> ExactRun:
        """The exact model's log-probabilities."""
        detach(panel.model)  # in the eyes of transformers alone
        protocol = self.protocol(panel)
        windows = self._cut(panel, protocol)
        return ExactRun(panel.model, windows, protocol, lambda: DynamicCache(config=panel.model.config))

    def measure(self, panel: "Panel", prepared: ExactRun, contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        cache = contender.new_cache()
        windows = prepared.score(panel.model, cache)
        accuracy = summarize(score for window in windows for score in window)
        samples = []
        for number, window in enumerate(windows):
            part = summarize(window)
            samples.append({"window": float(number), "loss": math.log(part.perplexity), **part.model_dump()})
        return Outcome.of(
            weigh(cache, panel.model, self.windows),
            metrics=accuracy.model_dump(exclude={"tokens"}),
            errors=_standard_errors(samples),
            samples=tuple(samples),
            layers=bits_by_layer(cache),
        )

    def _cut(self, panel: "Panel", protocol: Protocol) -> Tensor:
        return cut_windows(panel.ids, protocol, panel.tokenizer.bos_token_id)


def _standard_errors(samples: list[dict[str, float]]) -> dict[str, float]:
    """Of the means over windows, which are independent stretches; tokens of one window are not."""
    if len(samples) < 2:
        return {}
    errors = {
        name: statistics.stdev(sample[name] for sample in samples) / math.sqrt(len(samples))
        for name in ("kl_mean", "top1", "loss")
    }
    perplexity = math.exp(min(statistics.fmean(sample["loss"] for sample in samples), LARGEST_LOSS))
    # of a function of the mean, to first order
    return {"kl_mean": errors["kl_mean"], "top1": errors["top1"], "perplexity": perplexity * errors["loss"]}


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `perplexity`."""
    return [Perplexity]
