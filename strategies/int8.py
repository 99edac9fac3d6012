"""INT8: a byte per number and a scale per token and head, the safe half of 16 bits.

Symmetric, as serving systems store it (vLLM's `int8_per_token_head`), so that a token has one number beside its codes.
Theirs have 255 levels with one at zero; ours have 256, half of them on either side.
"""

from typing import ClassVar

from ..core import Format, LayerFormat, LayerSpec, Strategy
from ..registry.hookspecs import hookimpl


class INT8(Strategy):
    """8-bit integers, one symmetric scale per token and head; no calibration."""

    name: ClassVar[str] = "int8"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        side = Format(bits=8, symmetric=True)
        return LayerFormat(key=side, value=side)


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `int8`."""
    return [INT8]
