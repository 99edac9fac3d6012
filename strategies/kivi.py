"""KIVI (https://arxiv.org/abs/2402.02750): keys per channel, values per token, in groups, and the newest exact.

Keys have outlier channels, so a channel gets a grid of its own for every `group_size` tokens; values have none, so a
token gets one for every `group_size` channels (section 3.2). Both are asymmetric, from the smallest number to the
largest (equation 1). KIVI keeps its newest 128 values exact, and up to 128 keys; here both keep what `residual_length`
of the cache says, 128 if nothing else, and the beginning of the next group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..core import Format, LayerFormat, LayerSpec, Strategy
from ..registry.hookspecs import hookimpl


class KIVI(Strategy):
    """KIVI: keys per channel and values per token, in groups of 32; 2 or 4 bits, no calibration."""

    name: ClassVar[str] = "kivi"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"bits": 2}, {"bits": 4})
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": (2, 4), "group_size": (32, 64, 128)}

    bits: Literal[2, 4] = Field(default=2, description="Bits per number, keys and values alike.")
    group_size: Literal[32, 64, 128] = Field(
        default=32, description="Tokens of a key channel, and channels of a value token, that share a scale."
    )

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """A block is a group of tokens; heads that groups of channels do not divide get the largest that do.

        Raises ValueError for heads of an odd number of channels.
        """
        group = math.gcd(self.group_size, layer.value_dim)
        if group < 2:
            raise ValueError(f"kivi groups the channels of values, and heads of {layer.value_dim} have no groups")
        key = Format(bits=self.bits, scale="channel")
        value = Format(bits=self.bits, group=group)
        return LayerFormat(key=key, value=value, block=self.group_size)


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `kivi`."""
    return [KIVI]
