"""A layer packed block by block: sinks, packed blocks and exact tail."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import quantize
from ...kernels.format import Format, LayerFormat, Side
from ...kernels.quantize import NO_TABLES, Tables
from ..protocol import LayerSpec
from ..sinks import Sinks
from ..store import PackedStore, compact
from .fused import attend_fused
from .handles import LazyStates
from .layer import ROWS, SIDES, PackedLayer, under
from .masks import key_validity
from .rope import RotaryFunction, is_no_rotation
from .segments import Scoring, attend_packed

# encoding works on this many numbers at a time, so that a long prompt needs no float32 copy of itself
ENCODE_NUMBERS = 1 << 22

EXACT = LayerFormat(key=Format(codes="exact"), value=Format(codes="exact"))


class Chunk(NamedTuple):
    """Packed blocks of both sides, tokens `[start, stop)`."""

    start: int
    stop: int
    key: dict[str, Tensor]
    value: dict[str, Tensor]


class BlockLayer(PackedLayer):
    """Whenever the tail holds `residual_length` tokens and a whole block more, its oldest blocks are encoded.

    So the newest `residual_length` tokens are always exact, and cropping that many touches nothing packed. The first
    `sink_tokens` real tokens of each row are kept exact beside their codes, which attention skips.
    """

    def _clear(self) -> None:
        super()._clear()
        self.tables: dict[Side, Tables] = {}
        self.stores: dict[Side, PackedStore] = {"key": PackedStore(), "value": PackedStore()}
        self.sinks = Sinks(self.options.sink_tokens)
        self._cut: dict[Side, dict[str, Tensor]] = {}
        self._cut_tokens = 0

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
        if self.packed_tokens <= length < self.get_seq_length():
            self._keep_codes(length - self.packed_tokens, self._cut)
        super().truncate(length)
        self._forget_unread_tables()

    def _cut_packed(self, length: int) -> None:
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

    # ---- what attention reads --------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
        """Output `[batch, query_heads, queries, value_dim]` for a query that is already rotated."""
        output = attend_fused(self, query, key, value, scoring)
        return attend_packed(self, query, key, value, scoring) if output is None else output

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
            cos, sin = table.read_at(positions.clamp(max=packed - 1))
            key = rotary(key, cos.to(key.dtype), sin.to(key.dtype))
        return positions.clamp(max=packed - 1), present, key, self.sinks.states["value"]

    def angles(self, packed: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin `[batch or 1, packed, head_dim / 2]` of keys before RoPE whose halves they turn, else None."""
        rotary, table = self._require_rope()
        turning = isinstance(rotary, RotaryFunction) and rotary.turns_halves(self.head_dim)
        return table.halves(packed) if turning else None

    @property
    def turned(self) -> bool:
        """Whether keys still have to be rotated when they are read."""
        return self.formats.key.rope == "pre" and not is_no_rotation(self._require_rope()[0])

    def dequantize(self, side: Side, packed: int) -> Tensor:
        """The first `packed` tokens of one side, all in packed blocks, dense in the model's dtype, keys after RoPE."""
        states = self._decode(self.stores[side].read(0, packed // self.formats.block), side, self.tails[side].dtype)
        self.sinks.restore(states, side, 0, packed)
        return self.rotated(states, 0) if side == "key" else states

    # ---- bytes and files -------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind; with the spare capacity they are what is held."""
        if not self.is_initialized:
            return {}
        sizes: dict[str, int] = {}
        spare = 0
        for side in SIDES:
            used = self.stores[side].used_bytes()
            spare += self.stores[side].held_bytes() - sum(used.values())
            for name, size in used.items():
                row = f"{side} {ROWS.get(name, name)}"
                sizes[row] = sizes.get(row, 0) + size
            for name, tensor in self.tables.get(side, NO_TABLES).tensors().items():
                row = ROWS.get(name, "static scales")
                sizes[row] = sizes.get(row, 0) + tensor.untyped_storage().nbytes()
        beside = super().used_bytes()
        sizes["tail"] = beside["tail"]
        sizes["sinks"] = self.sinks.held_bytes()
        kept = [tensor for named in self._cut.values() for tensor in named.values()]
        sizes["cut block"] = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        sizes["spare"] = beside["spare"] + spare
        return sizes

    def tensors(self) -> list[Tensor]:
        """All that is held where the model computes."""
        first = [] if self.sinks.first is None else [self.sinks.first]
        stored = [tensor for store in self.stores.values() for tensor in store.tensors()]
        fitted = [tensor for tables in self.tables.values() for tensor in tables.tensors().values()]
        kept = [tensor for named in self._cut.values() for tensor in named.values()]
        return [*super().tensors(), *stored, *fitted, *kept, *self.sinks.states.values(), *first]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to restore this layer: plain values, and tensors by name."""
        values, tensors = super().state()
        if not values:
            return values, tensors
        tensors.update({f"sinks.{side}": states for side, states in self.sinks.states.items()})
        if self.sinks.first is not None:
            tensors["first"] = self.sinks.first
        for side in SIDES:
            tensors.update({f"packed.{side}.{name}": tensor for name, tensor in self.stores[side].read().items()})
            tensors.update({f"cut.{side}.{name}": tensor for name, tensor in self._cut.get(side, {}).items()})
            fitted = self.tables.get(side, NO_TABLES).tensors()
            tensors.update({f"tables.{side}.{name}": tensor for name, tensor in fitted.items()})
        return {**values, "blocks": self.stores["key"].blocks, "cut": self._cut_tokens}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the device of `tensors`. Raises ValueError when the formats are not the same."""
        super().restore(values, tensors)
        if not values:
            return
        for side in SIDES:
            if values["blocks"]:
                self.stores[side].append(under(f"packed.{side}.", tensors))
            if values["blocks"] or values["cut"]:
                self.tables[side] = Tables(**under(f"tables.{side}.", tensors))
        self._cut_tokens = values["cut"]
        self._cut = {side: under(f"cut.{side}.", tensors) for side in SIDES} if self._cut_tokens else {}
        sinks: dict[Side, Tensor] = {side: tensors[f"sinks.{side}"] for side in SIDES if f"sinks.{side}" in tensors}
        self.sinks = Sinks(self.options.sink_tokens, tensors.get("first"), sinks)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _ask_formats(self, spec: LayerSpec) -> None:
        formats = self.strategy.formats(spec) or EXACT
        if not isinstance(formats, LayerFormat):
            raise TypeError(
                f"{self.strategy.name!r} gives tokens widths of their own, but no way to decide them; derive it from "
                "core.AdaptiveStrategy"
            )
        if (formats.key.rope == "pre") != self.before_rope:
            raise ValueError(
                f"layer {self.index}: keys before RoPE are not supported for cached states of {spec.kv_heads} heads of "
                f"{spec.head_dim}, not the module's heads; use a strategy that stores keys after RoPE"
            )
        formats.require_fitting(spec.head_dim, spec.value_dim)
        self.formats = formats

    def _map_packed(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.map(change)
        self._cut = {side: {name: compact(change(t)) for name, t in named.items()} for side, named in self._cut.items()}
        self.sinks = self.sinks.map(change)

    def _store(self, key_states: Tensor, value_states: Tensor) -> dict[Side, Tensor]:
        """Append to the tail, and move whole blocks that are old enough from its front to the packed stores.

        Returns the exact states of all tokens that were not packed before.
        """
        block = self.formats.block
        tokens = self.tails["key"].length + key_states.shape[2]
        packing = max(0, tokens - self.options.residual_length) // block * block
        if not packing:
            return super()._store(key_states, value_states)
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
                else self._ask_tables(side, states[:, :, :block], seen).to(states.device)
                for side, states in leaving.items()
            }

    def _ask_tables(self, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        if self.split is None:
            return self.strategy.tables(self.spec, side, first, valid)
        return self.split.tables(self.strategy, self.spec, side, first, valid)

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
        # what stays exact beside a packed side is no business of the strategy's encoder
        encode = quantize.encode if fmt.codes == "exact" else self.strategy.encode
        parts = []
        for start in range(0, states.shape[2], step):
            piece = states[:, :, start : start + step]
            seen = None if valid is None else valid[:, start : start + step]
            parts.append(encode(piece, fmt, side, block, seen, tables))
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
