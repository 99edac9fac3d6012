"""Strategies that give every token a width of its own, and change it while decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.format import MixedFormat, Side
from .protocol import LayerSpec, Strategy


@dataclass(frozen=True)
class Evidence:
    """What is known of the tokens of one layer when their widths are decided.

    tokens: how many there are, `n` in the shapes below; the exact tail is not among them, but for those that now
        leave it.
    seen: real tokens so far, the exact tail among them: int64 `[batch]`.
    newer: tokens that stay in the exact tail, all of them newer than these.
    real: bool `[batch, n]`; False marks padding.
    attention: float `[batch, kv_heads, rows, n]`, what `notice` made of the last queries; None where no attention was
        seen since the last decision, as when another attention function reads the cache.
    low, high: ends of the ranges that tokens are encoded with, outliers left out: float32 `[batch, heads, n]` by side;
        heads is 1 where a row holds all heads of a token.
    widths: the present ones, uint8 `[batch, heads, m]` by side, of the first `m <= n` tokens; 0 was dropped.
    measured: what `measure` returned when the first tokens were packed.
    """

    tokens: int
    seen: Tensor
    newer: int
    real: Tensor
    attention: Tensor | None
    low: dict[Side, Tensor]
    high: dict[Side, Tensor]
    widths: dict[Side, Tensor]
    measured: dict[str, Tensor] = field(default_factory=dict)


class AdaptiveStrategy(Strategy):
    """Base of strategies that decide token by token, and again as decoding goes on.

    The cache keeps the newest `residual_length` tokens exact. Whenever `interval` tokens more wait there, they leave
    together: the cache asks `widths` about all tokens but the newest, packs those that leave, packs anew those whose
    width changes, and forgets those that get width 0. Nothing is decided in between. A token that becomes narrower is
    cut down from what is held; one that becomes wider needs the exact copy in host memory that `host_copy` asks for,
    and stays as it is without one. So a subclass writes `formats`, `widths` and, to see attention, `notice`::

        class Recent(AdaptiveStrategy):
            name: ClassVar[str] = "recent"
            interval: int = 64

            def formats(self, layer: LayerSpec) -> MixedFormat:
                rows = (Format(bits=2), Format(bits=4))
                return MixedFormat(key=rows, value=rows)

            def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Side, Tensor]:
                width = torch.full_like(evidence.low["key"], 2, dtype=torch.uint8)
                width[..., -1000:] = 4
                return {"key": width, "value": width}
    """

    interval: int = Field(default=64, ge=1, description="Tokens between two decisions about widths.")
    host_copy: bool = Field(default=False, description="Keep exact copies in host memory, so that tokens can widen.")

    @property
    def attention_window(self) -> int | None:
        """How many of the newest queries `Evidence.attention` is about; 0: none, None: all, their sum."""
        return 0

    @property
    def together(self) -> bool:
        """Whether all layers decide together, after the last one: `merge` is then asked."""
        return False

    def formats(self, layer: LayerSpec) -> MixedFormat | None:
        """The widths that tokens may have, and their rows; None keeps the layer exact."""
        raise NotImplementedError(f"strategy {self.name!r} must define formats(layer)")

    def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Side, Tensor]:
        """The widths that the tokens are to have: uint8 `[batch, heads, n]` by side, each one of the formats'.

        Width 0, allowed where the format drops tokens, drops a token where either side has it: of that row, or of all
        heads where a row holds them all. What is dropped comes back only from an exact copy.
        """
        raise NotImplementedError(f"strategy {self.name!r} must define widths(layer, evidence)")

    def notice(self, attention: Tensor) -> Tensor:
        """What to remember of attention probabilities `[batch, kv_heads, query_heads_per_kv_head, queries, tokens]`.

        Returns `[batch, kv_heads, queries, tokens]`. Rows of queries that are padding are 0. The cache joins what
        several forwards gave; where `attention_window` is None it keeps the sum over queries alone.
        """
        return attention.amax(2)

    def notice_query(self, layer: LayerSpec, query: Tensor) -> Tensor | None:
        """What to remember of queries until `measure`, one number each: `[batch, kv_heads, per kv head, queries]`.

        query: `[batch, kv_heads, query_heads_per_kv_head, queries, head_dim]` float32, after RoPE and times the model's
            factor for scores, `1 / sqrt(head_dim)` in most.
        """
        return None

    def measure(
        self, layer: LayerSpec, queries: Tensor | None, states: dict[Side, Tensor], real: Tensor
    ) -> dict[str, Tensor]:
        """Numbers about the prompt, each `[batch, heads]`, taken once, when the first tokens are packed.

        queries: what `notice_query` made of the newest queries, `[batch, kv_heads, per kv head, n]`; NaN where they are
            padding, None where nothing was noticed, as when another attention function read them.
        states: the exact tokens `[batch, kv_heads, n, dim]` that leave. real: bool `[batch, n]`.
        """
        return {}

    def merge(self, evidence: Sequence[Evidence]) -> Evidence:
        """One evidence for all layers, with one head; asked where `together`."""
        raise NotImplementedError(f"strategy {self.name!r} decides for all layers together and must define merge(...)")


def round_up(bits: Tensor, widths: Sequence[int]) -> Tensor:
    """The narrowest of ascending `widths` that holds `bits` (any real numbers), or the widest: uint8, as `bits`."""
    ladder = torch.tensor(widths, device=bits.device)
    place = torch.bucketize(bits.contiguous(), ladder.to(bits.dtype)).clamp_(max=len(widths) - 1)
    return ladder[place].to(torch.uint8)
