"""H2O: a baseline that drops tokens by the attention they accumulated, where the other strategies quantize them.

Zhang et al., "H2O: Heavy-Hitter Oracle", https://arxiv.org/abs/2306.14048. Of a budget of tokens, one half goes to the
newest, the other to the heavy hitters: those with the largest sum of attention over all queries so far. What stays is
kept in 16 bits; what is dropped is gone. The paper drops one token at every step; here `interval` tokens gather before
some are dropped, so the budget is met at these decisions and exceeded in between. It is a share of the text so far, and
grows with it. Sinks that the cache keeps may come on top.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..core import AdaptiveStrategy, Evidence, Format, LayerSpec, MixedFormat, Side
from ..core.budget import keep_best, share
from ..registry.hookspecs import hookimpl


class H2O(AdaptiveStrategy):
    """Baseline: tokens dropped by accumulated attention, per kv head; the newest and the heavy hitters stay."""

    name: ClassVar[str] = "h2o"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"keep": 0.5}, {"keep": 0.2})
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "keep": (0.1, 0.2, 0.3, 0.5, 0.7),
        "recent": (0.25, 0.5, 0.75),
    }

    keep: float = Field(default=0.2, gt=0, le=1, description="Share of the tokens so far that stay.")
    recent: float = Field(default=0.5, ge=0, le=1, description="Share of these that stay for being the newest.")

    def cache_options(self) -> dict[str, Any]:
        """No tail beside the newest tokens of the budget, which it would exceed in short texts."""
        return {"residual_length": 0}

    @property
    def attention_window(self) -> None:
        """All queries, their sum."""
        return None

    def formats(self, layer: LayerSpec) -> MixedFormat:
        """A row of 16 bits per token and kv head, or none."""
        exact = (Format(codes="exact"),)
        return MixedFormat(key=exact, value=exact, heads="apart", drops=True)

    def notice(self, attention: Tensor) -> Tensor:
        """The sum over the query heads that share a kv head."""
        return attention.sum(2)

    def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Side, Tensor]:
        """16 for the newest and the heavy hitters, 0 for the others."""
        score = None if evidence.attention is None else evidence.attention.sum(2)
        return keep_best(evidence, score, self.keep, share(self.recent, share(self.keep, evidence.seen)))


@hookimpl
def cachequant_strategies() -> list[type[AdaptiveStrategy]]:
    """Offer `h2o`."""
    return [H2O]
