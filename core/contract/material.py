"""What strategies are tried on: states, a tiny model, and calibrations to either."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels import quantize
from ...kernels.format import Format, LayerFormat, Side
from ...kernels.quantize import NO_TABLES, Tables
from ..adaptive import AdaptiveStrategy
from ..calibration import CalibratedStrategy, Calibration, Statistics
from ..calibration.statistics import Density, Extremes
from ..protocol import CacheQuantizer, LayerSpec, Strategy
from .check import Unmet
from .layers import LAYER, layer_of

SIDES: tuple[Side, Side] = ("key", "value")

OFFSET = 0.3
"""Mean of a channel of `states_of`, in units of another channel's scale."""


@dataclass(frozen=True)
class Packing:
    """One side of a strategy that is ready to pack `states_of` its blocks."""

    strategy: CacheQuantizer
    layer: LayerSpec
    side: Side
    fmt: Format
    block: int

    def states(self, blocks: int = 2) -> Tensor:
        """States to pack, always the same: `[2, kv_heads, blocks * block, head_dim]`."""
        return states_of(self.block, blocks)

    def tables(self, states: Tensor, valid: Tensor | None = None) -> Tables:
        """The strategy's tables, given the first block of `states`; exact sides have none."""
        if self.fmt.codes == "exact":
            return NO_TABLES
        first = states[:, :, : self.block]
        return self.strategy.tables(self.layer, self.side, first, None if valid is None else valid[:, : self.block])

    def encode(self, states: Tensor, valid: Tensor | None = None, tables: Tables | None = None) -> dict[str, Tensor]:
        """Packed `states`, with the tables of `self.states()` by default: one fit for all that is compared."""
        tables = self.tables(self.states()) if tables is None else tables
        # a cache does not ask about what it keeps exact
        encode = quantize.encode if self.fmt.codes == "exact" else self.strategy.encode
        packed = encode(states, self.fmt, self.side, self.block, valid, tables)
        if not isinstance(packed, dict) or not all(isinstance(tensor, Tensor) for tensor in packed.values()):
            raise Unmet(f"encode({self.side}) to return a dict of tensors, got {packed!r:.200}")
        return packed

    def decode(self, packed: dict[str, Tensor], tables: Tables | None = None) -> Tensor:
        """What `packed` stands for, read by whoever reads it in a cache."""
        tables = self.tables(self.states()) if tables is None else tables
        if self.fmt.codes == "custom":
            decoded = self.strategy.decode(packed, self.fmt, self.side, self.block, tables)
            if not isinstance(decoded, Tensor) or not decoded.is_floating_point():
                kind = decoded.dtype if isinstance(decoded, Tensor) else f"{decoded!r:.200}"
                raise Unmet(f"decode({self.side}) to return a tensor of floats, got {kind}")
            return decoded
        return quantize.decode(packed, self.fmt, self.side, LAYER.head_dim, self.block, tables)


def packings(strategy: CacheQuantizer) -> list[Packing]:
    """Both sides of a strategy that packs blocks; rows of mixed widths are the shared kernels'."""
    return _packings(strategy, ready_for_states(strategy))


def of_its_own(strategy: CacheQuantizer) -> list[Packing]:
    """The sides that it decodes itself."""
    return [packing for packing in packings(strategy) if packing.fmt.codes == "custom"]


def rebuilt(strategy: Any) -> Any:
    """An equal strategy that has done nothing yet, where settings can be dumped."""
    return type(strategy).model_validate(strategy.model_dump()) if isinstance(strategy, Strategy) else strategy


def block_of(strategy: CacheQuantizer) -> int:
    """Tokens that are packed at a time."""
    if isinstance(strategy, AdaptiveStrategy):
        return strategy.interval
    formats = strategy.formats(layer_of(strategy))
    return formats.block if isinstance(formats, LayerFormat) else 128


def states_of(block: int, blocks: int, seed: int = 7) -> Tensor:
    """Normal channels of very different scale and mean, as keys have: `[2, kv_heads, blocks * block, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, LAYER.kv_heads, blocks * block, LAYER.head_dim)
    return torch.randn(shape, generator=generator) * channel_scales() + channel_scales().flip(0) * OFFSET


def channel_scales() -> Tensor:
    """Standard deviations of the channels of `states_of`."""
    return torch.linspace(0.2, 3.0, LAYER.head_dim)


def tokens_of(batch: int, length: int) -> Tensor:
    """Token ids for the tiny model, always the same: `[batch, length]`."""
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def tiny(strategy: CacheQuantizer, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model, with as many layers as it takes for the strategy to pack one; the same weights every time."""
    from ..hf.tiny import tiny_model

    return tiny_model(dtype, layer_of(strategy).layers)


def same(first: Mapping[Any, Tensor], second: Mapping[Any, Tensor]) -> bool:
    """Whether tensors are equal by name."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In memory of their own."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ---- calibrating ---------------------------------------------------------------------------------------------------


def ready_for_model(strategy: CacheQuantizer) -> Any:
    """The strategy ready to serve the tiny model: calibrated for it, if it is one that has to be."""
    return _calibrated(strategy) if _has_to_be_calibrated(strategy) else strategy  # type: ignore[arg-type]


def ready_for_states(strategy: CacheQuantizer) -> Any:
    """The strategy ready to pack `states_of` its blocks."""
    return _calibrated_to_states(strategy) if _has_to_be_calibrated(strategy) else strategy  # type: ignore[arg-type]


def _has_to_be_calibrated(strategy: CacheQuantizer) -> bool:
    """Or calibrated again, if it was for another model."""
    return (
        isinstance(strategy, CalibratedStrategy)
        and strategy.calibration != "prompt"
        and (strategy.needs_statistics() or strategy.calibration is not None)
    )


@lru_cache(maxsize=64)
def _calibrated(strategy: CalibratedStrategy) -> CalibratedStrategy:
    return strategy.calibrate(tiny(strategy), None, tokens_of(3, 2 * block_of(strategy)), samples=3, heldout=0)


@lru_cache(maxsize=64)
def _calibrated_to_states(strategy: CalibratedStrategy) -> CalibratedStrategy:
    calibration = ready_for_model(strategy).calibration
    assert isinstance(calibration, Calibration)
    measured: dict[Side, Statistics] = {
        packing.side: _measured(strategy, packing) for packing in _packings(strategy, strategy)
    }
    return strategy.with_calibration(Calibration(calibration.record, {layer_of(strategy).index: measured}))


def _packings(strategy: CacheQuantizer, ready: CacheQuantizer) -> list[Packing]:
    layer = layer_of(strategy)
    formats = strategy.formats(layer)
    if not isinstance(formats, LayerFormat):
        return []
    return [Packing(ready, layer, side, getattr(formats, side), formats.block) for side in SIDES]


def _measured(strategy: CalibratedStrategy, packing: Packing) -> Statistics:
    """What a calibration finds in the states."""
    fmt, states, recipe = packing.fmt, packing.states(), strategy.recipe()
    low = high = None
    grid = Tables()
    if fmt.scale == "static":
        extremes = Extremes(states.shape[0] * states.shape[2], recipe.outliers)
        extremes.add(states)
        low, high = extremes.bounds()
        grid = Statistics(torch.empty(0), low, high).grid(fmt)
    normalised, width = quantize.normalise(states, fmt, packing.side, packing.block, None, grid)
    density = Density()
    density.add(normalised, width, torch.ones_like(normalised, dtype=torch.bool))
    sensitivity = torch.linspace(0.1, 1, LAYER.head_dim).expand(LAYER.kv_heads, -1) if recipe.gradients else None
    return Statistics(density.mass.float(), low, high, sensitivity)
