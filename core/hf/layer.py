"""One layer of the packed cache: sinks, packed blocks and exact tail."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...kernels import quantize
from ...kernels.format import Format, LayerFormat, Side
from ...kernels.quantize import NO_TABLES, Tables
from ..protocol import CacheQuantizer, LayerSpec
from ..sinks import Sinks
from ..store import ExactTail, PackedStore, compact
from .compat import tokens_to_keep
from .handles import LazyStates
from .masks import key_validity
from .rope import RotaryTable, RotaryTables, Rotate
from .segments import Scoring, attend_packed

# encoding works on this many numbers at a time, so that a long prompt needs no float32 copy of itself
ENCODE_NUMBERS = 1 << 22


SIDES: tuple[Side, Side] = ("key", "value")

EXACT = LayerFormat(key=Format(codes="exact"), value=Format(codes="exact"))

# rows of the memory report that gather several tensors
_ROWS = {
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


class Chunk(NamedTuple):
    """Packed blocks of both sides, tokens `[start, stop)`."""

    start: int
    stop: int
    key: dict[str, Tensor]
    value: dict[str, Tensor]


class PackedLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    Tokens enter the exact tail; whenever it holds `residual_length` tokens and a whole block more, its oldest blocks
    are encoded. So the newest `residual_length` tokens are always exact, and cropping that many touches nothing
    packed. What a forward packs, it still reads exact itself; packed data is read from the next forward on. The first
    `sink_tokens` real tokens of each row are kept exact beside their codes, which attention skips.
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
        self._layers = layers
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.tables: dict[Side, Tables] = {}
        self.stores: dict[Side, PackedStore] = {"key": PackedStore(), "value": PackedStore()}
        self.tails: dict[Side, ExactTail] = {}
        self.sinks = Sinks(self.options.sink_tokens)
        self._cut: dict[Side, dict[str, Tensor]] = {}
        self._cut_tokens = 0
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
        formats = self.strategy.formats(spec) or EXACT
        if (formats.key.rope == "pre") != self.before_rope:
            raise ValueError(
                f"layer {self.index}: keys before RoPE are not supported for cached states of shape "
                f"{tuple(key_states.shape)}, not the module's heads; use a strategy that stores keys after RoPE"
            )
        if not key_states.is_floating_point():
            raise ValueError(f"layer {self.index}: keys are {key_states.dtype}; a cache holds floating-point states")
        formats.require_fitting(spec.head_dim, spec.value_dim)
        self.spec, self.formats = spec, formats
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
        with torch.no_grad():
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
        """Tokens in packed blocks."""
        return self.stores["key"].blocks * self.formats.block if self.is_initialized else 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        A cut inside a packed block decodes the rest of that block into the tail. Its codes are kept: packed again
        later, these tokens get the same codes, and cutting at one place over and over loses nothing more.
        """
        if length < 0:
            raise ValueError(f"truncate({length}): a cache keeps 0 or more tokens; crop(-k) removes the newest k")
        if length >= self.get_seq_length():
            return
        self.version += 1
        if length >= self.packed_tokens:
            for tail in self.tails.values():
                tail.truncate(length - self.packed_tokens)
            self._keep_codes(length - self.packed_tokens, self._cut)
            self._forget_unread_tables()
            return
        blocks, rest = divmod(length, self.formats.block)
        packed = self.packed_tokens
        # copies: the store gives the memory of what it drops back
        halved: dict[Side, dict[str, Tensor]] = {
            side: {name: t.clone() for name, t in self.stores[side].read(blocks, blocks + 1).items()} for side in SIDES
        }
        self._keep_codes(rest, halved)
        for side in SIDES:
            cut = self._decode(self.stores[side].read(blocks, blocks + 1), side, self.tails[side].dtype)
            self.sinks.restore(cut, side, blocks * self.formats.block, packed)
            self.tails[side].replace(cut[:, :, :rest])
            self.stores[side].truncate(blocks)
        self._forget_unread_tables()

    # ---- what attention reads --------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
        """Output `[batch, query_heads, queries, value_dim]` for a query that is already rotated."""
        return attend_packed(query, key, value, scoring)

    def reads_packed(self, key: LazyStates) -> bool:
        """Whether attention has to read packed blocks, or finds all it may see exact."""
        return key.start > 0

    def chunks(self, packed: int, tokens: int) -> Iterator[Chunk]:
        """The blocks of the first `packed` tokens, about `tokens` tokens at a time."""
        block = self.formats.block
        step = max(1, tokens // block)
        for start in range(0, packed // block, step):
            stop = min(start + step, packed // block)
            key, value = (self.stores[side].read(start, stop) for side in SIDES)
            yield Chunk(start * block, stop * block, key, value)

    def decode_chunk(self, chunk: Chunk, side: Side, dtype: torch.dtype) -> Tensor:
        """Dense states of a chunk, keys after RoPE."""
        states = self._decode(chunk.key if side == "key" else chunk.value, side, dtype)
        return self.rotated(states, chunk.start) if side == "key" else states

    def present_sinks(self, packed: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """positions of the sinks, which of them are among the first `packed` tokens, both `[batch, sink_tokens]`, and
        the exact keys (after RoPE) and values."""
        if not self.sinks:
            return None
        positions = self.sinks.positions()
        present = positions < packed
        key = self.sinks.states["key"]
        if self.formats.key.rope == "pre":
            rotary, table = self._require_rope()
            key = rotary(key, *table.read_at(positions.clamp(max=packed - 1)))
        return positions.clamp(max=packed - 1), present, key, self.sinks.states["value"]

    def dequantize(self, side: Side, packed: int) -> Tensor:
        """The first `packed` tokens of one side, all in packed blocks, dense in the model's dtype, keys after RoPE."""
        states = self._decode(self.stores[side].read(0, packed // self.formats.block), side, self.tails[side].dtype)
        self.sinks.restore(states, side, 0, packed)
        return self.rotated(states, 0) if side == "key" else states

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
        if self.formats.key.rope == "post" or not key.shape[2]:
            return key
        rotary, table = self._require_rope()
        return rotary(key, *table.read(start, start + key.shape[2]))

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind; with the spare capacity they are what is held."""
        if not self.is_initialized:
            return {}
        sizes: dict[str, int] = {}
        for side in SIDES:
            for name, size in self.stores[side].used_bytes().items():
                row = f"{side} {_ROWS.get(name, name)}"
                sizes[row] = sizes.get(row, 0) + size
            for name, tensor in self.tables.get(side, NO_TABLES).tensors().items():
                row = _ROWS.get(name, "static scales")
                sizes[row] = sizes.get(row, 0) + tensor.untyped_storage().nbytes()
        sizes["tail"] = sum(tail.used_bytes() for tail in self.tails.values())
        sizes["sinks"] = self.sinks.held_bytes()
        kept = [tensor for named in self._cut.values() for tensor in named.values()]
        sizes["cut block"] = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        buffers = [*self.stores.values(), *self.tails.values()]
        used = sum(sum(store.used_bytes().values()) for store in self.stores.values()) + sizes["tail"]
        sizes["spare"] = sum(buffer.held_bytes() for buffer in buffers) - used
        return sizes

    def elements(self) -> int:
        """Numbers the held tokens stand for."""
        if not self.is_initialized:
            return 0
        batch = self.tails["key"].read().shape[0]
        return batch * self.kv_heads * self.get_seq_length() * (self.head_dim + self.value_dim)

    # ---- files -----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to restore this layer: plain values, and tensors by name."""
        if not self.is_initialized:
            return {}, {}
        tensors = {f"sinks.{side}": states for side, states in self.sinks.states.items()}
        if self.sinks.first is not None:
            tensors["first"] = self.sinks.first
        for side in SIDES:
            tensors[f"tail.{side}"] = self.tails[side].read()
            tensors.update({f"packed.{side}.{name}": tensor for name, tensor in self.stores[side].read().items()})
            tensors.update({f"cut.{side}.{name}": tensor for name, tensor in self._cut.get(side, {}).items()})
            fitted = self.tables.get(side, NO_TABLES).tensors()
            tensors.update({f"tables.{side}.{name}": tensor for name, tensor in fitted.items()})
        values = {"formats": self.formats.model_dump(mode="json"), "blocks": self.stores["key"].blocks}
        return {**values, "cut": self._cut_tokens}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the device of `tensors`. Raises ValueError when the formats are not the same."""
        if not values:
            return
        self._clear()
        tails = {side: tensors[f"tail.{side}"] for side in SIDES}
        self.lazy_initialization(tails["key"], tails["value"])
        if values["formats"] != self.formats.model_dump(mode="json"):
            raise ValueError(
                f"layer {self.index} was packed as {values['formats']}, the strategy now asks for another format"
            )
        for side in SIDES:
            if values["blocks"]:
                self.stores[side].append(_under(f"packed.{side}.", tensors))
            if values["blocks"] or values["cut"]:
                self.tables[side] = Tables(**_under(f"tables.{side}.", tensors))
            self.tails[side].append(tails[side])
        self._cut_tokens = values["cut"]
        self._cut = {side: _under(f"cut.{side}.", tensors) for side in SIDES} if self._cut_tokens else {}
        sinks: dict[Side, Tensor] = {side: tensors[f"sinks.{side}"] for side in SIDES if f"sinks.{side}" in tensors}
        self.sinks = Sinks(self.options.sink_tokens, tensors.get("first"), sinks)

    # ---- inside ----------------------------------------------------------------------------------------------------

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

    def _store(self, key_states: Tensor, value_states: Tensor) -> dict[Side, Tensor]:
        """Append to the tail, and move whole blocks that are old enough from its front to the packed stores.

        Returns the exact states of all tokens that were not packed before.
        """
        block = self.formats.block
        tokens = self.tails["key"].length + key_states.shape[2]
        packing = max(0, tokens - self.options.residual_length) // block * block
        if not packing:
            self.tails["key"].append(key_states)
            self.tails["value"].append(value_states)
            return {side: self.tails[side].read() for side in SIDES}
        new: dict[Side, Tensor] = {"key": key_states, "value": value_states}
        held: dict[Side, Tensor] = {
            side: torch.cat([self.tails[side].read(), states], dim=2) if self.tails[side].length else states
            for side, states in new.items()
        }
        leaving: dict[Side, Tensor] = {side: states[:, :, :packing] for side, states in held.items()}
        # encode everything before anything is changed: a strategy that raises loses nothing
        sinks, valid = self.sinks.advance(leaving, self.packed_tokens, key_validity(self._mask))
        tables = self._fitted(leaving, valid)
        packed = {side: self._encode(states, side, valid, tables[side]) for side, states in leaving.items()}
        for side in SIDES:
            self.stores[side].require_fitting(packed[side])
            if self._cut_tokens:
                packed[side] = self._with_kept_codes(packed[side], side)
        self._keep_codes(0, {})
        for side, states in held.items():
            self.stores[side].append(packed[side])
            self.tails[side].replace(states[:, :, packing:])
        self.sinks, self.tables = sinks, tables
        return held

    def _fitted(self, leaving: dict[Side, Tensor], valid: Tensor | None) -> dict[Side, Tables]:
        """The strategy's tables, asked for with the first block that is packed."""
        if self.tables:
            return self.tables
        block = self.formats.block
        seen = None if valid is None else valid[:, :block]
        # tables outlive this forward and may be shared: no tensors of inference mode, no graphs
        with torch.inference_mode(False), torch.no_grad():
            return {
                side: NO_TABLES
                if getattr(self.formats, side).codes == "exact"
                else self.strategy.tables(self.spec, side, states[:, :, :block], seen).to(states.device)
                for side, states in leaving.items()
            }

    def _keep_codes(self, tokens: int, cut: dict[Side, dict[str, Tensor]]) -> None:
        """Remember that the first `tokens` tokens of the tail, at most as many as before, were coded as in `cut`."""
        tokens = min(tokens, self._cut_tokens) if cut is self._cut else tokens
        self._cut, self._cut_tokens = (cut, tokens) if tokens else ({}, 0)

    def _forget_unread_tables(self) -> None:
        """Tables go when no codes are left that were made with them: the next first block gets its own."""
        if not self.packed_tokens and not self._cut_tokens:
            self.tables = {}

    def _with_kept_codes(self, packed: dict[str, Tensor], side: Side) -> dict[str, Tensor]:
        """`packed`, in which the first tokens keep the codes they had before a cut."""
        first = {name: tensor[:, :, :1] for name, tensor in packed.items()}
        fmt, block = getattr(self.formats, side), self.formats.block
        first = quantize.splice(self._cut[side], first, fmt, side, self._cut_tokens, block)
        return {name: torch.cat([first[name], tensor[:, :, 1:]], dim=2) for name, tensor in packed.items()}

    def _encode(self, states: Tensor, side: Side, valid: Tensor | None, tables: Tables) -> dict[str, Tensor]:
        block = self.formats.block
        fmt = getattr(self.formats, side)
        step = max(1, ENCODE_NUMBERS // (states[:, :, :block].numel())) * block
        parts = []
        for start in range(0, states.shape[2], step):
            piece = states[:, :, start : start + step]
            seen = None if valid is None else valid[:, start : start + step]
            parts.append(self.strategy.encode(piece, fmt, side, block, seen, tables))
        return {
            name: torch.cat([part[name] for part in parts], dim=2) if parts[1:] else parts[0][name] for name in parts[0]
        }

    def _decode(self, packed: dict[str, Tensor], side: Side, dtype: torch.dtype) -> Tensor:
        fmt = getattr(self.formats, side)
        if fmt.codes == "custom":
            return self.strategy.decode(packed, fmt, side, self.formats.block, self.tables[side]).to(dtype)
        dim = self.head_dim if side == "key" else self.value_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return quantize.decode(packed, fmt, side, dim, self.formats.block, self.tables[side], wide).to(dtype)

    def _require_rope(self) -> tuple[Rotate, RotaryTable]:
        if self._rotary is None or self._table is None:
            raise RuntimeError(_NOT_ATTACHED.format(self.index))
        return self._rotary, self._table

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.version += 1
        if not self.is_initialized:
            return
        for buffer in (*self.stores.values(), *self.tails.values()):
            buffer.map(change)
        self._cut = {side: {name: compact(change(t)) for name, t in named.items()} for side, named in self._cut.items()}
        self.sinks = self.sinks.map(change)
        self._mask = None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with_gradients(held: Tensor, new: Tensor) -> Tensor:
    """`held` states, whose newest tokens are `new`, with the graph of `new`: earlier tokens are constants."""
    if not (torch.is_grad_enabled() and new.requires_grad):
        return held
    return torch.cat([held[:, :, : held.shape[2] - new.shape[2]], new], dim=2)
