"""The nouns: strategies, formats, the packed cache and what it holds."""

from typing import TYPE_CHECKING, Any

from ..kernels.format import Bits, Format, LayerFormat, MixedFormat, Side, Width
from ..kernels.quantize import Tables
from .adaptive import AdaptiveStrategy, Evidence, round_up
from .memory import MemoryReport
from .protocol import CacheQuantizer, LayerSpec, Strategy

if TYPE_CHECKING:
    from .hf.attach import attach, detach
    from .hf.cache import PackedCache
    from .hf.simulate import SimulatedCache
    from .hf.static import StaticPackedCache

__all__ = [
    "AdaptiveStrategy",
    "Bits",
    "CacheQuantizer",
    "Evidence",
    "Format",
    "LayerFormat",
    "LayerSpec",
    "MemoryReport",
    "MixedFormat",
    "PackedCache",
    "Side",
    "SimulatedCache",
    "StaticPackedCache",
    "Strategy",
    "Tables",
    "Width",
    "attach",
    "detach",
    "round_up",
]

# transformers takes seconds to import; plugins and `cachequant list` do not need it
_LAZY = {
    "PackedCache": "cache",
    "SimulatedCache": "simulate",
    "StaticPackedCache": "static",
    "attach": "attach",
    "detach": "attach",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".hf.{_LAZY[name]}", __name__), name)
