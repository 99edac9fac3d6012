"""FP8: the bytes of e4m3 floats, four bits of exponent and three of mantissa, what most serving systems offer.

A scale maps the largest number to 448, the largest e4m3 has (https://arxiv.org/abs/2209.05433). It is taken of every
token and head, or once per head or per layer of the first block that is packed. Being floats, numbers lose no precision
to a scale larger than they need, so those get headroom for what is to come, and what exceeds it saturates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import Format, LayerFormat, LayerSpec, Side, Strategy, Tables
from ..kernels.float8 import FLOAT8_MAX
from ..registry.hookspecs import hookimpl


class FP8(Strategy):
    """8-bit floats (e4m3), scaled per token and head, per head, or per layer; no calibration."""

    name: ClassVar[str] = "fp8"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"scale": "tensor"})
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {"scale": ("token", "head", "tensor")}

    scale: Literal["token", "head", "tensor"] = Field(
        default="token", description="What shares a scale: a token of a head, all tokens of a head, or of a layer."
    )
    headroom: float = Field(
        default=2.0, ge=1, le=64, description="Range of scales that tokens share, over that of the first block."
    )

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        scale: Literal["token", "static"] = "token" if self.scale == "token" else "static"
        side = Format(codes="float8", bits=8, symmetric=True, scale=scale)
        return LayerFormat(key=side, value=side)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """Scales `[kv_heads, head_dim]` of the first block, but for its padding and sinks."""
        if self.scale == "token":
            return super().tables(layer, side, first, valid)
        size = first.float().abs()
        if valid is not None:
            # a block of nothing but padding and sinks still says how large states are
            counted = valid | ~valid.any()
            size = size.masked_fill(~counted[:, None, :, None], 0)
        largest = size.amax((0, 2, 3)) if self.scale == "head" else size.amax().expand(first.shape[1])
        # zeros say nothing: e4m3 as it is
        scale = torch.where(largest > 0, largest * self.headroom / FLOAT8_MAX, 256.0)
        scale = scale[:, None].expand(-1, first.shape[3]).contiguous()
        return Tables(scale=scale, zero=torch.zeros_like(scale))


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `fp8`."""
    return [FP8]
