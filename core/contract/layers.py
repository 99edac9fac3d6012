"""The layer that a strategy is tried on."""

from ..protocol import CacheQuantizer, LayerSpec

LAYER = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=64, value_dim=64)

_DEPTHS = (LAYER.layers, 6, 12)


def layer_of(strategy: CacheQuantizer) -> LayerSpec:
    """The first layer that the strategy packs, in a deeper model where it keeps the first and last ones exact."""
    for layers in _DEPTHS:
        for index in range(layers):
            layer = LayerSpec(index, layers, LAYER.kv_heads, LAYER.head_dim, LAYER.value_dim)
            if strategy.formats(layer) is not None:
                return layer
    return LAYER
