"""The layer that a strategy is tried on."""

from dataclasses import replace

from ..protocol import CacheQuantizer, LayerSpec

LAYER = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=64, value_dim=64)

DEPTHS = (LAYER.layers, 6, 12)
"""Layers of the models in which one is looked for that the strategy packs."""


def layers_of(depth: int) -> list[LayerSpec]:
    """Every layer of a model of that many."""
    return [replace(LAYER, index=index, layers=depth) for index in range(depth)]


def layer_of(strategy: CacheQuantizer) -> LayerSpec:
    """The first layer that the strategy packs, in a deeper model where it keeps the first and last ones exact."""
    return packed_layer(strategy) or LAYER


def packed_layer(strategy: CacheQuantizer) -> LayerSpec | None:
    """The same; None if it keeps all of them exact."""
    tried = (layer for depth in DEPTHS for layer in layers_of(depth))
    return next((layer for layer in tried if strategy.formats(layer) is not None), None)
