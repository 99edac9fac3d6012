"""KVQuant: non-uniform codes, per-channel keys before RoPE, and a share of outliers exact.

Hooper et al., https://arxiv.org/abs/2401.18079. `docs/strategies/kvquant.md` says when to use which field, and where it
differs.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..core import Format, LayerFormat, LayerSpec, Side, Tables
from ..core.calibration import CalibratedStrategy, Recipe, Statistics, Weights, fitted_tables, normalised_tables
from ..registry.hookspecs import hookimpl

Bits = Literal[2, 3, 4]


class KVQuant(CalibratedStrategy):
    """Codebooks fitted to where the loss is sensitive, per-channel keys before RoPE, outliers and sinks exact."""

    name: ClassVar[str] = "kvquant"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bits": 4},
        {"bits": 3},
        {"bits": 2},
        {"bits": 4, "outliers": 0},
        {"bits": 3, "outliers": 0},
        {"bits": 2, "outliers": 0},
        {"bits": 3, "calibration": "prompt"},
    )
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "key_bits": (2, 3, 4),
        "value_bits": (2, 3, 4),
        "datatype": ("nuq", "nf", "int"),
        "outliers": (0.0, 0.005, 0.01, 0.02),
        "sink_tokens": (0, 1, 4),
        "q_norm": (False, True),
        "key_scale": ("static", "channel"),
    }

    bits: Bits = Field(default=4, description="Bits per number, keys and values alike.")
    key_bits: Bits | None = Field(default=None, description="Bits of the keys, where they differ.")
    value_bits: Bits | None = Field(default=None, description="Bits of the values, where they differ.")
    datatype: Literal["nuq", "nf", "int"] = Field(
        default="nuq", description="Fitted codebook per layer and side, NormalFloat, or equal steps."
    )
    outliers: float = Field(default=0.01, ge=0, le=0.25, description="Share of numbers kept exact beside their codes.")
    sink_tokens: int = Field(default=1, ge=0, le=128, description="First tokens kept exact, and out of all statistics.")
    q_norm: bool = Field(default=False, description="Decode with the mean and deviation of the calibration text.")
    profile: Literal["paper", "repository"] = Field(
        default="paper", description="Where the two differ: weights F*s**2 or F; sinks out of the key ranges or in."
    )
    weights: Weights | None = Field(default=None, description="Of the codebook fit; None: as the profile has them.")
    key_scale: Literal["static", "channel", "token"] = Field(
        default="static",
        description="Keys: one grid per channel, from the calibration; one per channel and block; or one per token.",
    )
    key_rope: Literal["pre", "post"] = Field(default="pre", description="Quantize keys before or after RoPE.")
    value_scale: Literal["token", "channel", "static"] = Field(
        default="token", description="Values: one grid per token, or per channel as for keys."
    )
    block: Literal[32, 64, 128, 256] = Field(default=128, description="Tokens packed at a time.")

    @model_validator(mode="after")
    def _prompts_have_no_gradients(self) -> "KVQuant":
        if self.calibration == "prompt" and self.weights == "fisher":
            raise ValueError("calibration='prompt' has no gradients; leave weights unset, or use 'equal'")
        return self

    def needs_statistics(self) -> bool:
        """NormalFloat and equal steps on online grids are fitted to nothing."""
        return self.datatype == "nuq" or self.q_norm or "static" in (self.key_scale, self.value_scale)

    def cache_options(self) -> dict[str, Any]:
        """Sinks stay exact."""
        return {"sink_tokens": self.sink_tokens}

    def recipe(self) -> Recipe:
        """Ranges without outliers and sinks; gradients for weighted codebooks."""
        return Recipe(
            outliers=self.outliers,
            sink_tokens=self.sink_tokens,
            ranges_include_sinks=self.profile == "repository" and self.sink_tokens > 0,
            gradients=self.datatype == "nuq" and self._weights() != "equal",
        )

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        key = self._format("key", self.key_bits, self.key_scale, layer.head_dim)
        value = self._format("value", self.value_bits, self.value_scale, layer.value_dim)
        return LayerFormat(key=key.model_copy(update={"rope": self.key_rope}), value=value, block=self.block)

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        """Grid and codebook of one side of one layer."""
        tables = fitted_tables(statistics, fmt, side, self.datatype, self._weights())
        return normalised_tables(statistics, fmt, tables) if self.q_norm else tables

    def _weights(self) -> Weights:
        return self.weights or ("fisher-scaled" if self.profile == "paper" else "fisher")

    def _format(self, side: Side, bits: Bits | None, scale: Literal["static", "channel", "token"], dim: int) -> Format:
        if scale == "static" and self.calibration == "prompt":
            scale = "channel"  # a prompt's ranges do not hold for what follows it
        row = dim if side == "key" else self.block
        vector = dim if scale == "token" else self.block
        return Format(
            codes="affine" if self.datatype == "int" else "codebook",
            bits=bits or self.bits,
            scale=scale,
            outliers=_slots(self.outliers, row),
            trim=0 if scale == "static" else _slots(self.outliers / 2, vector),
        )


def _slots(share: float, numbers: int) -> int:
    """How many of `numbers` a share is, rounded up."""
    return ceil(share * numbers - 1e-9)


@hookimpl
def cachequant_strategies() -> list[type[CalibratedStrategy]]:
    """Offer `kvquant`."""
    return [KVQuant]
