"""The seam between strategies and everything else."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..kernels import quantize
from ..kernels.format import Format, LayerFormat, MixedFormat, Side
from ..kernels.quantize import NO_TABLES, Tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTRACT_VERSION = 1
"""Of what `CacheQuantizer` asks. It grows when a strategy that kept the contract before may not keep it any more."""


@dataclass(frozen=True)
class LayerSpec:
    """The attention layer a strategy is asked about.

    kv_heads and the dims are those of the tensors that really arrive, so under tensor parallelism they are local;
    `tables` alone is asked with all heads of the layer.
    """

    index: int
    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int


@runtime_checkable
class CacheQuantizer(Protocol):
    """What the cache needs from a strategy: numbers and, for bytes of its own making, two functions.

    A strategy is immutable: it holds configuration and fitted tables, never state of a running generation, so one
    object serves every layer, batch and thread. The cache keeps the sinks, the exact tail, the packed buffers and
    the masks, and calls, per layer:

    1. `require_model(model)` and `cache_options()` once, when the cache is made;
    2. `formats(layer)` once, before the first token is stored;
    3. `tables(...)` once, with the first block that is packed;
    4. `encode(...)` whenever `format.block` tokens leave the exact tail, oldest first;
    5. `decode(...)` only for formats with `codes="custom"`; all other bytes are read by the shared kernels.

    The shortest way to implement it is to derive from `Strategy` and write `formats`; a complete strategy is then::

        class TwoBitValues(Strategy):
            name: ClassVar[str] = "two-bit-values"

            def formats(self, layer: LayerSpec) -> LayerFormat:
                return LayerFormat(key=Format(bits=4), value=Format(bits=2, group=32))

    `cachequant.core.contract` holds the checks that every strategy has to pass.
    """

    name: ClassVar[str]
    """The name users type: lower-case words joined by hyphens, unique among installed plugins."""

    def require_model(self, model: "PreTrainedModel") -> None:
        """Raise ValueError, saying what to do, unless the strategy is ready to serve `model`."""
        ...

    def cache_options(self) -> dict[str, Any]:
        """The options of `PackedCache` that suit the strategy, such as `{"sink_tokens": 1}`; callers may override."""
        ...

    def formats(self, layer: LayerSpec) -> LayerFormat | MixedFormat | None:
        """How this layer's keys and values are packed; None keeps the layer exact.

        A MixedFormat is for strategies that derive from `core.AdaptiveStrategy`.

        Raises ValueError, saying what would fit, when the layer's shape cannot be served.
        """
        ...

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """Fitted numbers that all tokens share: codebook `[2**bits]`, static scale and zero `[kv_heads, head_dim]`.

        first, valid: the first block about to be packed, as `encode` will get it, for strategies that fit themselves
        to the text at hand. The others ignore it.

        Under tensor parallelism `layer` and `first` are of all heads, and each process keeps its share.
        """
        ...

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        """Pack `states [batch, kv_heads, tokens, head_dim]`, tokens a multiple of `block`, without changing it.

        valid: bool `[batch, tokens]` or None; False marks padding and sinks, which no statistic may include.

        Returns named tensors `[batch, kv_heads, tokens // block, ...]`; block `i` depends on the tokens of block `i`
        alone, and batch rows and heads are independent. The names label the bytes in `cache.memory()`.
        """
        ...

    def decode(self, packed: Mapping[str, Tensor], fmt: Format, side: Side, block: int, tables: Tables) -> Tensor:
        """Inverse of `encode` for `codes="custom"`: float states `[batch, kv_heads, tokens, head_dim]`."""
        ...


class Strategy(BaseModel):
    """Frozen pydantic base of the strategies: the fields are the configuration, the constructor and the table row.

    Subclasses set `name`, declare fields with bounds and a description, and write `formats`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings that leaderboards and contract tests run, each the keyword arguments of one instance."""
    positional: ClassVar[str | None] = None
    """The field that a spec may give without its name, as `preset:FILE`; None: there is none."""
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Fields that `cachequant tune` may vary, and the values it tries; combinations that are refused are left out."""
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other names it is found by, each with the settings that the name stands for."""
    contract: ClassVar[int | None] = None
    """The `CONTRACT_VERSION` it was written for; None: the installed one."""
    exceptions: ClassVar[Mapping[str, str]] = {}
    """Checks of the contract that it does not keep, by name, each with the reason."""

    def require_model(self, model: "PreTrainedModel") -> None:
        """See `CacheQuantizer.require_model`; any model by default."""

    def cache_options(self) -> dict[str, Any]:
        """See `CacheQuantizer.cache_options`; the cache's own by default."""
        return {}

    def formats(self, layer: LayerSpec) -> LayerFormat | MixedFormat | None:
        """See `CacheQuantizer.formats`."""
        raise NotImplementedError(f"strategy {self.name!r} must define formats(layer)")

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """See `CacheQuantizer.tables`; none by default."""
        return NO_TABLES

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        """See `CacheQuantizer.encode`; the shared reference encoder by default."""
        return quantize.encode(states, fmt, side, block, valid, tables)

    def decode(self, packed: Mapping[str, Tensor], fmt: Format, side: Side, block: int, tables: Tables) -> Tensor:
        """See `CacheQuantizer.decode`."""
        raise NotImplementedError(f"strategy {self.name!r} uses codes='custom' and must define decode(...)")

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON: what a saved cache must be read with. Where files lie is no part of it."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def on(self, model: "PreTrainedModel", **cache_options: Any) -> AbstractContextManager[Any]:
        """Context in which every `model.generate` without a cache of its own gets a fresh `PackedCache`.

        `cache_options` are those of `PackedCache`. For pipelines and scripts that cannot be edited.
        """
        from .hf.automatic import automatic

        return automatic(model, self, **cache_options)
