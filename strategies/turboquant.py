"""TurboQuant (https://arxiv.org/abs/2504.19874), as serving systems run it: rotate, then the codebook of a normal.

Rotated by a Hadamard matrix, the numbers of a key are close to normally distributed, whatever they were. So every key
is divided by its root mean square, and each number goes to the nearest of the levels that lose least on the normal
distribution (Lloyd-Max): the scalar case of HIGGS (https://arxiv.org/abs/2411.17525). Rounding shortens keys and with
them scores, which the norm correction undoes. Values have no outlier channels and are kept on a plain uniform grid.

Presets and boundary layers are those of vLLM, which has none of the latter in hybrid models. The paper's random
rotation is a Hadamard matrix without signs there and here, and its QJL residual, which amplifies noise, is left out.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core import Format, LayerFormat, LayerSpec, Side, Strategy, Tables
from ..core.calibration import lloyd_max
from ..registry.hookspecs import hookimpl


class TurboQuant(Strategy):
    """TurboQuant: Hadamard rotation, Lloyd-Max codebook and norm correction for keys, uniform values."""

    name: ClassVar[str] = "turboquant"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "turboquant_k8v4": {"key_bits": 8, "value_bits": 4, "norm_correction": False},
        "turboquant_4bit_nc": {"key_bits": 4, "value_bits": 4},
        "turboquant_k3v4_nc": {"key_bits": 3, "value_bits": 4},
        "turboquant_3bit_nc": {"key_bits": 3, "value_bits": 3},
    }
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"boundary_layers": 0},
        {"key_bits": 3, "value_bits": 3, "boundary_layers": 0},
    )
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "key_bits": (2, 3, 4, 8),
        "value_bits": (2, 3, 4, 8),
        "norm_correction": (False, True),
        "boundary_layers": (0, 1, 2),
    }

    key_bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of the keys; 8: e4m3 floats, not rotated.")
    value_bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of the values.")
    norm_correction: bool = Field(default=True, description="Decoded keys have the norm of the encoded ones.")
    boundary_layers: int = Field(default=2, ge=0, description="First and last layers, each, that stay exact.")

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        """None for boundary layers, which are at most half of all layers at either end."""
        exact = min(self.boundary_layers, layer.layers // 2)
        if not exact <= layer.index < layer.layers - exact:
            return None
        if self.key_bits == 8:
            key = Format(codes="float8", bits=8, symmetric=True)
        else:
            unit: Literal["norm", "rms"] = "norm" if self.norm_correction else "rms"
            key = Format(codes="codebook", bits=self.key_bits, symmetric=True, unit=unit, rotation="hadamard")
        return LayerFormat(key=key, value=Format(bits=self.value_bits))

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """The Lloyd-Max levels of the normal distribution, for keys."""
        if side == "value" or self.key_bits == 8:
            return super().tables(layer, side, first, valid)
        return _normal(self.key_bits).to(first.device)


@cache
def _normal(bits: int) -> Tables:
    return Tables(codebook=lloyd_max(bits))


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `turboquant`."""
    return [TurboQuant]
