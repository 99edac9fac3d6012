"""No quantization: the yardstick. Tokens pass through the packed store in the model's own dtype."""

from typing import ClassVar, Literal

from pydantic import Field

from ..core import Format, LayerFormat, LayerSpec, Strategy
from ..registry.hookspecs import hookimpl


class NoQuantization(Strategy):
    """Exact keys and values in the packed cache: the yardstick for accuracy, and a test of all that surrounds it."""

    name: ClassVar[str] = "none"

    key_rope: Literal["post", "pre"] = Field(default="post", description="Store keys after or before RoPE.")
    block: Literal[32, 64, 128, 256] = Field(default=128, description="Tokens that leave the exact tail at a time.")

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """Both sides exact."""
        key = Format(codes="exact", rope=self.key_rope)
        return LayerFormat(key=key, value=Format(codes="exact"), block=self.block)


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `none`."""
    return [NoQuantization]
