"""Rotated INT4: a grid per token and head, of numbers that a Hadamard rotation has made alike.

Multiplied with an orthogonal matrix, queries and keys keep their dot products, and the outlier channels of a key are
spread over its neighbours (QuaRot, https://arxiv.org/abs/2404.00456). Blocks along head_dim do, and are cheaper than
whole heads: what serving systems run (SAW-INT4, https://github.com/togethercomputer/saw-int4: blocks of 16, keys alone
by default). Rotated values are rotated back once, after they are mixed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..core import Format, LayerFormat, LayerSpec, Strategy
from ..registry.hookspecs import hookimpl


class Rotated(Strategy):
    """Per-token INT4 after a block-Hadamard rotation of keys, or of keys and values; no calibration."""

    name: ClassVar[str] = "rotated"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"rotate": "both", "rotation_size": None})
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "bits": (2, 3, 4, 8),
        "rotate": ("key", "both"),
        "rotation_size": (16, 32, 64, None),
    }

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits per number, keys and values alike.")
    rotate: Literal["key", "both"] = Field(default="key", description="What is rotated: keys, or keys and values.")
    rotation_size: Literal[2, 4, 8, 16, 32, 64, 128, 256] | None = Field(
        default=16,
        description="Channels rotated together, where a head is a multiple of them; else, and for None, the largest "
        "power of two that it is a multiple of.",
    )

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        value = self._turned(layer.value_dim) if self.rotate == "both" else Format(bits=self.bits)
        return LayerFormat(key=self._turned(layer.head_dim), value=value)

    def _turned(self, dim: int) -> Format:
        size = None if self.rotation_size is None or dim % self.rotation_size else self.rotation_size
        return Format(bits=self.bits, rotation="hadamard", rotation_size=size)


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `rotated`."""
    return [Rotated]
