"""How much memory a cache may take, in the three ways users say it."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

_TEXT = re.compile(r"(x)?\s*(\d+(?:\.\d+)?)\s*(B|bits?)?", re.IGNORECASE)

SERVED_BITS = 16
"""What models are served with, and `x4` is four times smaller than."""


class Budget(BaseModel):
    """Bits per cached number, or bytes per token of one sequence over all layers; metadata included either way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    unit: Literal["bits", "bytes"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `3.5` (bits per number), `x4` (times smaller than 16 bits) or `2048B` (bytes per token).

        Raises ValueError.
        """
        found = _TEXT.fullmatch(text.strip())
        amount = float(found[2]) if found else 0.0
        if found is None or not amount or (found[1] and found[3]):
            raise ValueError(
                f"{text!r} is no budget; write 3.5 for bits per number, x4 for four times smaller than 16 bits, or "
                "2048B for bytes per token"
            )
        if found[1]:
            return cls(text=text.strip(), unit="bits", amount=SERVED_BITS / amount)
        in_bytes = (found[3] or "").upper() == "B"
        return cls(text=text.strip(), unit="bytes" if in_bytes else "bits", amount=amount)

    def bytes_per_token(self, elements: int) -> float:
        """Of all layers together, where a token is `elements` numbers."""
        return self.amount if self.unit == "bytes" else self.amount * elements / 8

    def bits(self, elements: int) -> float:
        """Per number."""
        return 8 * self.bytes_per_token(elements) / elements
