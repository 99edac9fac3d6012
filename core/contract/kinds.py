"""Which strategies a check is for: what they are decides, not what they are called."""

from collections.abc import Callable

from ...kernels.format import LayerFormat
from ..adaptive import AdaptiveStrategy
from ..calibration import CalibratedStrategy
from ..protocol import CacheQuantizer, Strategy
from .layers import layer_of

Kind = Callable[[CacheQuantizer], bool]


def every_strategy(strategy: CacheQuantizer) -> bool:
    """All of them."""
    return True


def has_settings(strategy: CacheQuantizer) -> bool:
    """Its settings are the fields of a pydantic model; implementations of the protocol need not have any."""
    return isinstance(strategy, Strategy)


def needs_a_calibration(strategy: CacheQuantizer) -> bool:
    """It learns from a text what it cannot do without."""
    return isinstance(strategy, CalibratedStrategy) and strategy.needs_statistics()


def packs_blocks(strategy: CacheQuantizer) -> bool:
    """It encodes blocks, which is all that leave layers exact or give tokens widths of their own do not."""
    return isinstance(strategy.formats(layer_of(strategy)), LayerFormat)


def packs_shared_formats(strategy: CacheQuantizer) -> bool:
    """The shared kernels read the bytes of at least one side."""
    return any(codes != "custom" for codes in _codes(strategy))


def packs_bytes_of_its_own(strategy: CacheQuantizer) -> bool:
    """At least one side is decoded by itself."""
    return "custom" in _codes(strategy)


def decides_widths(strategy: CacheQuantizer) -> bool:
    """Its tokens have widths of their own."""
    return isinstance(strategy, AdaptiveStrategy)


def packs_once(strategy: CacheQuantizer) -> bool:
    """What is packed stays as it is; tokens that are packed again show in no single forward."""
    return not decides_widths(strategy)


def _codes(strategy: CacheQuantizer) -> tuple[str, ...]:
    formats = strategy.formats(layer_of(strategy))
    return (formats.key.codes, formats.value.codes) if isinstance(formats, LayerFormat) else ()
