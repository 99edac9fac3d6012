"""NormalFloat codes for the KV cache.

Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314, section 3: where numbers are normally distributed around zero,
levels at the quantiles of that distribution are all used alike. There it packs weights, here keys and values.
"""

from typing import Any, ClassVar, Literal

import torch
from cachequant.core import Format, LayerFormat, LayerSpec, Side, Strategy, Tables
from cachequant.registry.hookspecs import hookimpl
from pydantic import Field
from torch import Tensor

# The outermost quantile: the ends of the distribution itself are infinite. Equation 4 leaves it open; QLoRA's code has
# the mean of 1 - 1/30 and 1 - 1/32.
OUTERMOST = 1 - (1 / 30 + 1 / 32) / 2


class NF4(Strategy):
    """NormalFloat: 16 levels at quantiles of the normal distribution, scaled by each token's largest number."""

    name: ClassVar[str] = "nf4"
    contract: ClassVar[int | None] = 1
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"rotation": "hadamard"})

    group_size: int | None = Field(
        default=None, ge=8, description="Channels that share a scale; None: all of a head. QLoRA has 64."
    )
    rotation: Literal["none", "hadamard"] = Field(
        default="none", description="Rotate keys and values before rounding: sums of channels are nearly normal."
    )

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """Codes of 4 bits, and one 16-bit scale per token and group: zero is a level, so there is no zero point."""
        fmt = Format(codes="codebook", bits=4, symmetric=True, group=self.group_size, rotation=self.rotation)
        return LayerFormat(key=fmt, value=fmt)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """The same levels for every layer and side: they are fitted to no text."""
        return Tables(codebook=normal_float().to(first.device))


def normal_float() -> Tensor:
    """The levels, `[16]` float32 from -1 to 1: 8 quantiles for either sign, which share zero, and one more above."""
    below = torch.special.ndtri(torch.linspace(1 - OUTERMOST, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, OUTERMOST, 9, dtype=torch.float64))
    return torch.cat([below / -below[0], above[1:] / above[-1]]).float()


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `nf4`."""
    return [NF4]
