"""One layer of the packed cache, as transformers and attention see it; how tokens are packed is its subclasses'."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...kernels.format import Side
from ..protocol import CacheQuantizer, LayerSpec
from ..store import ExactTail
from .compat import tokens_to_keep
from .handles import LazyStates
from .precision import full_precision
from .rope import RotaryTable, RotaryTables, Rotate
from .segments import Scoring
from .split import SplitHeads

SIDES: tuple[Side, Side] = ("key", "value")

# rows of the memory report that gather several tensors
ROWS = {
    "outlier_index": "outliers",
    "outlier_value": "outliers",
    "sensitivity": "static scales",
    "codebook": "codebooks",
    "gain": "codebooks",
    "offset": "codebooks",
}

_NOT_ATTACHED = (
    "layer {} stores keys before RoPE but was given no position embeddings: the model is not attached. "
    "Construct the cache with the model that uses it, PackedCache(model, strategy), and do not detach in between"
)


class CacheOptions(BaseModel):
    """What the cache keeps exact, whatever the strategy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    residual_length: int = Field(default=128, ge=0, description="Newest tokens that are always exact.")
    sink_tokens: int = Field(default=0, ge=0, le=128, description="First real tokens of each row kept exact.")
    skip_layers: tuple[int, ...] = Field(default=(), description="Layers kept exact; negative counts from the last.")


class PackedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, all of them in the exact tail; subclasses pack the oldest.

    What a forward packs, it still reads exact itself; packed data is read from the next forward on.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self, strategy: CacheQuantizer, index: int, layers: int, options: CacheOptions, rotary_tables: RotaryTables
    ) -> None:
        super().__init__()
        self.strategy, self.index, self.options, self.rotary_tables = strategy, index, options, rotary_tables
        self.before_rope = False
        """Whether this layer expects keys before RoPE; set by the cache, which knows the module."""
        self.split: SplitHeads | None = None
        """How the kv heads of this layer are split over processes, None where all are here; set by the cache."""
        self._layers = layers
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.tails: dict[Side, ExactTail] = {}
        self._mask: Tensor | None = None
        self._rotary: Rotate | None = None
        self._table: RotaryTable | None = None
        self._query_angles: tuple[Tensor, Tensor] | None = None
        self._query_owner: int | None = None
        self._rope_noted = False

    # ---- what transformers calls -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Ask the strategy for this layer's formats, given the shapes that really arrive."""
        spec = LayerSpec(self.index, self._layers, key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if not key_states.is_floating_point():
            raise ValueError(f"layer {self.index}: keys are {key_states.dtype}; a cache holds floating-point states")
        self._ask_formats(spec)
        self.spec = spec
        self.kv_heads, self.head_dim, self.value_dim = spec.kv_heads, spec.head_dim, spec.value_dim
        self.dtype, self.device = key_states.dtype, key_states.device
        self.tails = {"key": ExactTail(key_states), "value": ExactTail(value_states)}
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[batch, kv_heads, tokens, dim]` and return lazy handles to all tokens.

        Raises ValueError, with nothing stored, when batch, heads, dtype or device differ from what the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._require_same(key_states, "key")
        self._require_same(value_states, "value")
        if self.before_rope and not self._rope_noted:
            raise RuntimeError(_NOT_ATTACHED.format(self.index))
        start = self.packed_tokens
        with torch.no_grad(), full_precision(key_states.device):
            exact = self._store(key_states.detach(), value_states.detach())
        new: dict[Side, Tensor] = {"key": key_states, "value": value_states}
        exact = {side: _with_gradients(states, new[side]) for side, states in exact.items()}
        self.version += 1
        self._mask, self._rope_noted = None, False
        return LazyStates(self, "key", start, exact["key"]), LazyStates(self, "value", start, exact["value"])

    def get_seq_length(self) -> int:
        """Tokens held per batch row, padding included."""
        return self.packed_tokens + self.tails["key"].length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys after the coming update, index of the first)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens (older transformers: keep `tokens_to_remove`)."""
        self.truncate(tokens_to_keep(self.get_seq_length(), tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.version += 1
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda tensor: tensor[indices.to(tensor.device) if isinstance(indices, Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Refuse: transformers would offload between update and attention, while a handle still reads the data."""
        raise NotImplementedError("a packed cache cannot be offloaded layer by layer; use fewer bits or device_map")

    prefetch = offload

    def require_batch(self, batch: int) -> None:
        """Raise ValueError unless the cache is empty or holds this many rows."""
        held = self.tails["key"].read().shape[0] if self.is_initialized else batch
        if batch != held:
            raise ValueError(
                f"layer {self.index}: the cache holds a batch of {held}, this forward has {batch}; "
                "call cache.batch_repeat_interleave, cache.batch_select_indices or cache.reset first"
            )

    # ---- length ----------------------------------------------------------------------------------------------------

    @property
    def packed_tokens(self) -> int:
        """Tokens, the oldest, that are packed."""
        return 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if length < 0:
            raise ValueError(f"truncate({length}): a cache keeps 0 or more tokens; crop(-k) removes the newest k")
        if length >= self.get_seq_length():
            return
        self.version += 1
        if length < self.packed_tokens:
            self._cut_packed(length)
            return
        for tail in self.tails.values():
            tail.truncate(length - self.packed_tokens)

    # ---- what attention reads --------------------------------------------------------------------------------------

    @abstractmethod
    def attend(self, query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
        """Output `[batch, query_heads, queries, value_dim]` for a query that is already rotated."""

    @abstractmethod
    def dequantize(self, side: Side, packed: int) -> Tensor:
        """The first `packed` tokens of one side, all of them packed, dense in the model's dtype, keys after RoPE."""

    def observe(self, query: Tensor, key: LazyStates, scoring: Scoring) -> None:
        """Told the query of a forward that finds all it may see exact, for layers that look at attention."""

    def settle(self) -> None:
        """Told that attention has read what it needs of the latest update, for layers that pack only then."""

    def reads_packed(self, key: LazyStates) -> bool:
        """Whether attention has to read what is packed, or finds all it may see exact."""
        return key.start > 0

    # ---- RoPE and masks, handed over by the attention hook ---------------------------------------------------------

    def note_mask(self, mask: Tensor | None) -> None:
        """The attention mask of the coming forward: which tokens are padding decides statistics and sinks."""
        self._mask = mask

    def note_rope(self, owner: nn.Module, rotary: Rotate, table: RotaryTable, cos: Tensor, sin: Tensor) -> None:
        """The true position embeddings of the coming forward, for a format that stores keys before RoPE."""
        self._rotary, self._table = rotary, table
        self._query_angles, self._query_owner = (cos, sin), id(owner)
        self._rope_noted = True

    @property
    def awaits_query(self) -> bool:
        """Whether the query of this forward still has to be rotated."""
        return self._query_angles is not None

    def rotated_query(self, query: Tensor, module: nn.Module) -> Tensor:
        """`query` after RoPE; only the module that was given identity embeddings still needs it."""
        if self._rotary is None or self._query_angles is None or self._query_owner != id(module):
            return query
        cos, sin = self._query_angles
        self._query_angles = self._query_owner = None  # of this forward alone
        return self._rotary(query, cos, sin)

    def rotated(self, key: Tensor, start: int) -> Tensor:
        """Stored keys `[batch, kv_heads, n, head_dim]` of the tokens from `start` on, after RoPE."""
        if not self.before_rope or not key.shape[2]:
            return key
        rotary, table = self._require_rope()
        cos, sin = table.read(start, start + key.shape[2])
        return rotary(key, cos.to(key.dtype), sin.to(key.dtype))

    # ---- bytes and files -------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind; with the spare capacity they are what is held."""
        if not self.is_initialized:
            return {}
        used = sum(tail.used_bytes() for tail in self.tails.values())
        return {"tail": used, "spare": sum(tail.held_bytes() for tail in self.tails.values()) - used}

    def tensors(self) -> list[Tensor]:
        """All that is held where the model computes."""
        return [tensor for tail in self.tails.values() for tensor in tail.tensors()]

    def host_bytes(self) -> dict[str, int]:
        """Bytes by kind of what is kept in host memory beside."""
        return {}

    def elements(self) -> int:
        """Numbers the held tokens stand for."""
        if not self.is_initialized:
            return 0
        batch = self.tails["key"].read().shape[0]
        return batch * self.kv_heads * self.get_seq_length() * (self.head_dim + self.value_dim)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to restore this layer: plain values, and tensors by name."""
        if not self.is_initialized:
            return {}, {}
        formats = None if self.formats is None else self.formats.model_dump(mode="json")
        return {"formats": formats}, {f"tail.{side}": self.tails[side].read() for side in SIDES}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the device of `tensors`. Raises ValueError when the formats are not the same."""
        if not values:
            return
        self._clear()
        tails = {side: tensors[f"tail.{side}"] for side in SIDES}
        self.lazy_initialization(tails["key"], tails["value"])
        packed_as = values["formats"]
        # fields that formats had not yet when the file was written have their defaults
        if (packed_as if self.formats is None else type(self.formats).model_validate(packed_as)) != self.formats:
            raise ValueError(
                f"layer {self.index} was packed as {values['formats']}, the strategy now asks for another format"
            )
        for side in SIDES:
            self.tails[side].append(tails[side])

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _ask_formats(self, spec: LayerSpec) -> None:
        """Ask the strategy how to pack heads of the shapes that arrive."""
        self.formats: Any = None

    def _store(self, key_states: Tensor, value_states: Tensor) -> dict[Side, Tensor]:
        """Append to the tail, and pack what is old enough; returns the exact states of what was not packed before."""
        self.tails["key"].append(key_states)
        self.tails["value"].append(value_states)
        return {side: self.tails[side].read() for side in SIDES}

    @abstractmethod
    def _cut_packed(self, length: int) -> None:
        """Keep the first `length` tokens, fewer than are packed."""

    def _require_same(self, states: Tensor, side: Side) -> None:
        self.require_batch(states.shape[0])
        held = self.tails[side].read()
        if states.shape[1] != held.shape[1] or states.shape[3] != held.shape[3]:
            raise ValueError(
                f"layer {self.index}: {side}s of shape {tuple(states.shape)} do not continue "
                f"{tuple(held.shape)}; a cache serves one model"
            )
        if states.dtype != held.dtype or states.device != held.device:
            raise ValueError(
                f"layer {self.index}: {side}s are {states.dtype} on {states.device}, the cache holds {held.dtype} on "
                f"{held.device}; call cache.reset() after moving or casting the model"
            )

    def _require_rope(self) -> tuple[Rotate, RotaryTable]:
        if self._rotary is None or self._table is None:
            raise RuntimeError(_NOT_ATTACHED.format(self.index))
        return self._rotary, self._table

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.version += 1
        if not self.is_initialized:
            return
        for tail in self.tails.values():
            tail.map(change)
        self._mask = None
        self._map_packed(change)

    def _map_packed(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to what is packed."""


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with_gradients(held: Tensor, new: Tensor) -> Tensor:
    """`held` states, whose newest tokens are `new`, with the graph of `new`: earlier tokens are constants."""
    if not (torch.is_grad_enabled() and new.requires_grad):
        return held
    return torch.cat([held[:, :, : held.shape[2] - new.shape[2]], new], dim=2)
