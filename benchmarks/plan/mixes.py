"""What is assumed of widths that a strategy decides token by token: no formula knows them before the text."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Mix(BaseModel):
    """How many rows of one side have which width.

    least, most: every token as narrow, or as wide, as the formats allow: bounds. average: the two widths around
    `bits`, mixed so that a row has as many on average. kept: the share `keep` of the tokens so far in 16 bits, the
    others dropped, as `core.budget` does it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["least", "most", "average", "kept"]
    bits: float | None = Field(default=None, ge=0, le=16)
    keep: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _numbers_belong_to_kinds(self) -> Self:
        if (self.kind == "average") != (self.bits is not None) or (self.kind == "kept") != (self.keep is not None):
            raise ValueError(f"a mix {self.kind!r} with bits={self.bits} and keep={self.keep}: only 'average' has bits")
        return self

    def label(self, widths: tuple[int, ...], drops: bool) -> str:
        """What a table says about it."""
        if self.keep is not None:
            return f"keeps {100 * self.keep:g}%"
        if self.bits is not None:
            return f"if {self.bits:g} bits on average"
        width = (0 if drops else min(widths)) if self.kind == "least" else max(widths)
        return f"at {self.kind}: all of {width} bits"

    def counts(self, tokens: int, tail: int, sinks: int, widths: tuple[int, ...], drops: bool) -> dict[int, int]:
        """Rows by width, of `tokens` tokens that left a tail of `tail`; the first `sinks` have 16 bits in any case."""
        sinks = min(sinks, tokens)
        free = tokens - sinks
        if self.keep is not None:
            # the tail counts as kept; sinks may come on top of the budget
            room = max(_share(self.keep, tokens + tail) - tail, _share(self.keep / 2, tokens))
            return {16: min(tokens, room + sinks)}
        ladder: list[int] = sorted({*widths, 0} if drops else set(widths))
        if self.bits is None:
            counts = {ladder[0 if self.kind == "least" else -1]: free}
        else:
            bits = min(max(self.bits, ladder[0]), ladder[-1])
            low = max(width for width in ladder if width <= bits)
            high = min(width for width in ladder if width >= bits)
            wide = round(free * (bits - low) / (high - low)) if high > low else 0
            counts = {low: free - wide, high: wide} if high > low else {low: free}
        counts[16] = counts.get(16, 0) + sinks
        return {width: count for width, count in counts.items() if width and count}


def _share(part: float, tokens: int) -> int:
    """As `core.budget.share`."""
    return -int(-(part * tokens - 1e-6) // 1)
