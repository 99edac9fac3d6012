"""Uniform integer grids, computed online: what most papers call round-to-nearest.

Per-token scales for keys and values are the FlexGen / transformers default; per-channel keys follow KIVI
(https://arxiv.org/abs/2402.02750), before RoPE KVQuant (https://arxiv.org/abs/2401.18079), and the Hadamard rotation
QuaRot (https://arxiv.org/abs/2404.00456).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..core import Format, LayerFormat, LayerSpec, Strategy
from ..registry.hookspecs import hookimpl

Bits = Literal[2, 3, 4, 8]


class Uniform(Strategy):
    """Uniform grids, per token by default: no calibration, every model, any of 2, 3, 4 and 8 bits."""

    name: ClassVar[str] = "uniform"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bits": 4},
        {"bits": 3},
        {"bits": 2},
        {"bits": 2, "rotation": "hadamard"},
        {"bits": 4, "key_scale": "channel", "key_rope": "pre"},
        {"bits": 3, "key_scale": "channel", "key_rope": "pre"},
        {"bits": 2, "key_scale": "channel", "key_rope": "pre"},
    )
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "key_bits": (2, 3, 4, 8),
        "value_bits": (2, 3, 4, 8),
        "group_size": (None, 32, 16),
        "symmetric": (False, True),
        "key_scale": ("token", "channel"),
        "key_rope": ("post", "pre"),
        "rotation": ("none", "hadamard"),
        "block": (32, 64, 128),
    }

    bits: Bits = Field(default=4, description="Bits per number, keys and values alike.")
    key_bits: Bits | None = Field(default=None, description="Bits of the keys, where they differ.")
    value_bits: Bits | None = Field(default=None, description="Bits of the values, where they differ.")
    group_size: int | None = Field(
        default=None, ge=8, description="Channels that share a token's scale; None: all of a head."
    )
    symmetric: bool = Field(default=False, description="Grids centred on zero: half the metadata, less accurate.")
    key_scale: Literal["token", "channel"] = Field(
        default="token", description="Keys: one scale per token and group, or per channel and block of tokens."
    )
    key_rope: Literal["post", "pre"] = Field(default="post", description="Quantize keys after or before RoPE.")
    rotation: Literal["none", "hadamard"] = Field(default="none", description="Rotate keys and values before rounding.")
    block: Literal[32, 64, 128, 256] = Field(default=128, description="Tokens packed at a time.")

    @model_validator(mode="after")
    def _one_remedy_for_outlier_channels(self) -> "Uniform":
        if self.rotation == "hadamard" and self.key_scale == "channel":
            raise ValueError(
                "rotation='hadamard' mixes the channels that key_scale='channel' separates; choose one of the two"
            )
        return self

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        key = Format(
            bits=self.key_bits or self.bits,
            scale=self.key_scale,
            group=self.group_size if self.key_scale == "token" else None,
            symmetric=self.symmetric,
            rotation=self.rotation,
            rope=self.key_rope,
        )
        value = Format(
            bits=self.value_bits or self.bits,
            group=self.group_size,
            symmetric=self.symmetric,
            rotation=self.rotation,
        )
        return LayerFormat(key=key, value=value, block=self.block)


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `uniform`."""
    return [Uniform]
