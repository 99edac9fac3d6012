"""Scissorhands: a baseline that drops tokens which persistently get little attention, where others quantize them.

Liu et al., https://arxiv.org/abs/2305.17118. A query finds a token unimportant if it pays it less than its average
attention; the tokens that most of the last queries found so are dropped. What stays is kept in 16 bits; what is dropped
is gone. Differences from the paper: the budget is a share of the text so far, as in `h2o`, and met whenever `interval`
tokens have gathered, instead of a fixed size from which half is dropped when it is full; the average is over the tokens
that are still there; and fewer queries are remembered, since each costs a byte per token and kv head.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..core import AdaptiveStrategy, Evidence, Format, LayerSpec, MixedFormat, Side
from ..core.budget import keep_best
from ..registry.hookspecs import hookimpl


class Scissorhands(AdaptiveStrategy):
    """Baseline: tokens dropped that persistently get little attention, per kv head; the others stay."""

    name: ClassVar[str] = "scissorhands"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"keep": 0.5}, {"keep": 0.2})
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "keep": (0.1, 0.2, 0.3, 0.5, 0.7),
        "recent": (10, 32, 64),
        "window": (16, 64, 256),
    }

    keep: float = Field(default=0.2, gt=0, le=1, description="Share of the tokens so far that stay.")
    recent: int = Field(default=10, ge=0, description="Newest tokens that stay whatever their attention.")
    window: int = Field(default=64, ge=1, le=512, description="Newest queries that are asked.")

    def cache_options(self) -> dict[str, Any]:
        """No tail beside the newest tokens of the budget, which it would exceed in short texts."""
        return {"residual_length": 0}

    @property
    def attention_window(self) -> int:
        """As configured."""
        return self.window

    def formats(self, layer: LayerSpec) -> MixedFormat:
        """A row of 16 bits per token and kv head, or none."""
        exact = (Format(codes="exact"),)
        return MixedFormat(key=exact, value=exact, heads="apart", drops=True)

    def notice(self, attention: Tensor) -> Tensor:
        """Which tokens a query finds unimportant, bool; query heads that share a kv head are asked for their mean.

        A query has nothing against tokens that came after it, one that is padding nothing against any.
        """
        attention = attention.mean(2)
        average = attention.sum(-1, keepdim=True) / (attention > 0).sum(-1, keepdim=True).clamp(min=1)
        queries, tokens = attention.shape[2:]
        before = torch.ones(queries, tokens, dtype=torch.bool, device=attention.device).tril(tokens - queries)
        return (attention < average) & before

    def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Side, Tensor]:
        """16 for the newest and those with the fewest queries against them, 0 for the others."""
        score = None if evidence.attention is None else -evidence.attention.sum(2).float()
        return keep_best(evidence, score, self.keep, torch.full_like(evidence.seen, self.recent))


@hookimpl
def cachequant_strategies() -> list[type[AdaptiveStrategy]]:
    """Offer `scissorhands`."""
    return [Scissorhands]
