"""One layer of the static cache: prompts go through the packed layer, single tokens through preallocated buffers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import backend, fused, quantize
from ...kernels.format import Side
from ...kernels.ops import Buffers, Layout
from ...kernels.quantize import Tables
from ..protocol import CacheQuantizer
from ..sinks import Sinks
from ..store import ExactTail, PackedStore, allocate, compact
from .blocks import BlockLayer
from .compat import tokens_to_keep
from .layer import ROWS, SIDES, CacheOptions
from .masks import key_validity
from .rope import RotaryTables


class StaticStates(NamedTuple):
    """What `update` returns for a single token, as keys and as values: attention reads the layer's buffers."""

    layer: "StaticPackedLayer"


class FixedStore(PackedStore):
    """A packed store in memory allocated once, zero where nothing is stored."""

    def __init__(self, capacity: int, buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers = buffers or {}

    def named(self) -> dict[str, Tensor]:
        """The buffers, all `capacity` blocks of each."""
        return self._buffers

    def prepare(self, like: dict[str, Tensor]) -> None:
        """Allocate for blocks shaped as those of `like`, if that has not been done."""
        self._reserve(like, 0)

    def truncate(self, blocks: int) -> None:
        """Keep the first `blocks` blocks."""
        self.blocks = min(blocks, self.blocks)

    def _reserve(self, like: dict[str, Tensor], blocks: int) -> None:
        if blocks > self._capacity:
            raise ValueError(f"{blocks} blocks do not fit a store of {self._capacity}")
        if not self._buffers:
            shapes = {name: (*tensor.shape[:2], self._capacity, *tensor.shape[3:]) for name, tensor in like.items()}
            self._buffers = {name: allocate(tensor, shapes[name]).zero_() for name, tensor in like.items()}


class StaticPackedLayer(BlockLayer):
    """Either *frozen*, all it holds in `buffers`, or *thawed*, a `BlockLayer` whose packed blocks lie there already.

    A forward of several tokens thaws the layer, and attention freezes it again when it has read what it needs. Frozen,
    the device alone knows how many tokens and blocks there are, and a forward of one token is two operations.
    """

    is_compileable = True

    def __init__(
        self,
        max_length: int,
        strategy: CacheQuantizer,
        index: int,
        layers: int,
        options: CacheOptions,
        rotary_tables: RotaryTables,
    ) -> None:
        self.max_length = max_length
        self.buffers: Buffers | None = None
        super().__init__(strategy, index, layers, options, rotary_tables)

    def _clear(self) -> None:
        super()._clear()
        self.frozen = False
        self._real: Tensor | None = None
        self._first: Tensor | None = None

    # ---- what transformers calls -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As the packed layer; buffers of an earlier text are used again where they fit."""
        super().lazy_initialization(key_states, value_states)
        capacity = max(0, self.max_length - self.options.residual_length) // self.formats.block
        held = self.buffers
        if held is not None and not all(map(_alike, held.tails, (key_states, value_states))):
            held = self.buffers = None
        named: dict[Side, dict[str, Tensor]] = {} if held is None else held.packed()
        self.stores: dict[Side, Any] = {side: FixedStore(capacity, named.get(side)) for side in SIDES}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store `[batch, kv_heads, tokens, dim]`, and return what our attention function reads.

        Raises ValueError, with nothing stored, for more tokens than fit (where the count lies on a GPU, or compiled, a
        single token sets `buffers.overflowed` instead), and for states that do not continue what the cache holds.
        """
        if key_states.shape[2] == 1 and self.frozen:
            return self._append(key_states, value_states)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "only a forward of one token can be compiled, after a prompt; call the model itself for prompts, and "
                "the compiled one for the tokens that follow"
            )
        self.require_sound()
        self.thaw()
        self._require_room(self.get_seq_length(), key_states.shape[2])
        validity = key_validity(self._mask)
        handles = super().update(key_states, value_states, *args, **kwargs)
        past, batch = self.packed_tokens, key_states.shape[0]
        self._first = self.sinks.first_real(past, validity, batch)
        self._real = None if validity is None else validity.expand(batch, -1)[:, past : self.get_seq_length()]
        return handles

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[StaticStates, StaticStates]:
        buffers = self.require_buffers()
        for held, states, side in zip(buffers.tails, (key_states, value_states), SIDES, strict=True):
            if not _alike(held, states):
                self._require_same(states, side)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("steps of a static cache have no gradients; decode under torch.no_grad()")
        if not torch.compiler.is_compiling():
            self._mask = None
            if key_states.device.type == "cpu":
                self._require_room(int(buffers.length), 1)
        buffers.append(key_states.detach(), value_states.detach())
        return StaticStates(self), StaticStates(self)

    def settle(self) -> None:
        """Told that attention has read what it needs of the latest update."""
        self.freeze()

    def attend_one(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, s_aux: Tensor | None
    ) -> Tensor:
        """Attention of one query per row; see `Buffers.attend`. A mask of 2 dimensions is of keys, as in `masks.py`."""
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        return self.require_buffers().attend(query, mask, scaling, softcap, s_aux)

    def note_mask(self, mask: Tensor | None) -> None:
        """Kept for prompts: what is compiled must leave nothing behind."""
        if not torch.compiler.is_compiling():
            super().note_mask(mask)

    def get_seq_length(self) -> Any:
        """Tokens held per batch row: int, or a scalar tensor while only the device knows."""
        return self.require_buffers().length if self.frozen else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys after the coming update, index of the first); all that fit, where one token comes."""
        if self.frozen and query_length == 1:
            return self.max_length, 0
        return int(self.get_seq_length()) + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; see `truncate`."""
        self.require_sound()
        self.truncate(tokens_to_keep(int(self.get_seq_length()), tokens_to_remove))

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are."""
        super().reset()
        if self.buffers is not None:
            for tensor in self.buffers.tensors():
                tensor.zero_()

    # ---- what the device counts ------------------------------------------------------------------------------------

    def require_buffers(self) -> Buffers:
        """The buffers, which a layer has that is frozen."""
        assert self.buffers is not None
        return self.buffers

    def require_sound(self) -> None:
        """Raise RuntimeError if a token came that did not fit."""
        if self.buffers is not None and bool(self.buffers.overflowed):
            raise RuntimeError(
                f"layer {self.index}: steps went beyond max_length={self.max_length}; their tokens were not stored and "
                "their logits are wrong. cache.truncate(n) goes on from the first n tokens, cache.reset() from none"
            )

    def freeze(self) -> None:
        """Move all that is held to the buffers, in place; changes nothing where nothing is held."""
        if self.frozen or not self.is_initialized or not self.get_seq_length():
            return
        if not self.tables:
            self.tables = self._fitted_early()
        buffers = self.buffers = self.buffers or self._allocated()
        past, stop = self.packed_tokens, self.get_seq_length()
        slots = torch.arange(past, stop, device=self.device) % buffers.real.shape[1]
        for ring, side in zip(buffers.tails, SIDES, strict=True):
            ring.flatten(2, 3).index_copy_(2, slots, self.tails[side].read())
            self.tails[side] = ExactTail(self.tails[side].read())
        real = buffers.real.new_ones((len(buffers.real), len(slots))) if self._real is None else self._real
        buffers.real.index_copy_(1, slots, real)
        for held, side in zip(buffers.sinks, SIDES, strict=True):
            if self.sinks:
                held.copy_(self.sinks.states[side])
        buffers.first.copy_(buffers.first.new_zeros(()) if self._first is None else self._first)
        for held, side in zip((buffers.key_tables, buffers.value_tables), SIDES, strict=True):
            for tensor, fitted in zip(held, self.tables[side].tensors().values(), strict=True):
                tensor.copy_(fitted)
        buffers.length.fill_(stop)
        buffers.blocks.fill_(past // self.formats.block)
        served = backend.triton_serves(self.device) and not fused.unserved(self.formats, self.head_dim, self.value_dim)
        if served:
            fused.prepare(self.formats, buffers.tables(), self.device)
        self._real = self._first = None
        self.frozen = True

    def thaw(self) -> None:
        """Become a `BlockLayer` whose packed blocks stay in the buffers; waits for the device."""
        if not self.frozen:
            return
        buffers, block = self.require_buffers(), self.formats.block
        length, blocks = int(buffers.length), int(buffers.blocks)
        slots = torch.arange(blocks * block, length, device=self.device) % buffers.real.shape[1]
        for ring, side in zip(buffers.tails, SIDES, strict=True):
            self.tails[side].replace(ring.flatten(2, 3).index_select(2, slots))
            self.stores[side].blocks = blocks
        self._real, self._first = buffers.real.index_select(1, slots), buffers.first
        kept = zip(SIDES, buffers.sinks, strict=True)
        count = self.options.sink_tokens
        self.sinks = Sinks(count, buffers.first, dict(kept)) if blocks and count else Sinks(count)
        self.frozen = False
        self._forget_unread_tables()

    # ---- length ----------------------------------------------------------------------------------------------------

    @property
    def packed_tokens(self) -> int:
        """Tokens in packed blocks."""
        return int(self.require_buffers().blocks) * self.formats.block if self.frozen else super().packed_tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, and drop what did not fit.

        Raises ValueError for a cut inside a packed block.
        """
        if self.is_initialized and 0 <= length < self.packed_tokens and length % self.formats.block:
            raise ValueError(
                f"layer {self.index}: a static cache is cut where tokens are exact, from {self.packed_tokens} on, or "
                f"between blocks of {self.formats.block}, not at {length}; use PackedCache to cut anywhere"
            )
        self.thaw()
        super().truncate(length)
        if self.buffers is not None:
            self.buffers.overflowed.zero_()
        if self._real is not None:
            self._real = self._real[:, : self.tails["key"].length]
        self.freeze()

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind; what is allocated and not used yet is spare."""
        if not self.frozen:
            return super().used_bytes()
        buffers, block = self.require_buffers(), self.formats.block
        sizes: dict[str, int] = {}
        for side, parts in buffers.packed().items():
            for name, tensor in parts.items():
                row = f"{side} {ROWS.get(name, name)}"
                held = tensor[:, :, : self.packed_tokens // block]
                sizes[row] = sizes.get(row, 0) + held.numel() * held.itemsize
        for tables in buffers.tables().values():
            for name, tensor in tables.tensors().items():
                row = ROWS.get(name, "static scales")
                sizes[row] = sizes.get(row, 0) + tensor.numel() * tensor.itemsize
        tail = int(buffers.length) - self.packed_tokens
        sizes["tail"] = sum(ring[:, :, 0, 0].numel() * ring.itemsize * tail for ring in buffers.tails)
        sizes["sinks"] = sum(states.numel() * states.itemsize for states in buffers.sinks)
        sizes["spare"] = sum(t.untyped_storage().nbytes() for t in buffers.tensors()) - sum(sizes.values())
        return sizes

    def tensors(self) -> list[Tensor]:
        """All that is held where the model computes."""
        return self.require_buffers().tensors() if self.frozen else super().tensors()

    def elements(self) -> int:
        """Numbers the held tokens stand for."""
        if not self.is_initialized:
            return 0
        batch = self.tails["key"].read().shape[0]
        return batch * self.kv_heads * int(self.get_seq_length()) * (self.head_dim + self.value_dim)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Refused."""
        raise NotImplementedError("a static cache is not written to files; use PackedCache for caches to keep")

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.freeze()
        if not self.frozen:
            return self._clear()  # nothing is held
        self.version += 1
        buffers = self.require_buffers()
        changed = change(buffers.first)
        if changed.shape != buffers.first.shape:
            raise ValueError(
                f"a static cache serves one batch size, {len(buffers.first)} here, not {len(changed)}; use PackedCache "
                "to select or repeat rows"
            )
        for tensor in buffers.batched():
            tensor.copy_(change(tensor))

    def _require_room(self, held: int, tokens: int) -> None:
        if held + tokens > self.max_length:
            raise ValueError(
                f"layer {self.index}: {held} tokens are held and {tokens} more come, but max_length={self.max_length}; "
                "make a longer cache, or reset it"
            )

    def _fitted_early(self) -> dict[Side, Tables]:
        """The strategy's tables before a block is due: fitted to the first block, or to as much of it as there is."""
        block, held = self.formats.block, self.tails["key"].length
        missing = max(0, block - held)
        first: dict[Side, Tensor] = {
            side: torch.nn.functional.pad(self.tails[side].read()[:, :, :block], (0, 0, 0, missing)) for side in SIDES
        }
        batch = first["key"].shape[0]
        real = torch.ones(batch, held, dtype=torch.bool, device=self.device) if self._real is None else self._real
        real = torch.nn.functional.pad(real[:, :block], (0, missing), value=False)
        _, valid = self.sinks.advance(first, 0, real)
        fitted = self._fitted(first, valid)
        if missing and getattr(self.strategy, "calibration", None) == "prompt":
            backend.warn_once(
                f"{self.strategy.name!r} is fitted to a prompt of {held} tokens; give one of {block} or more, or "
                "calibrate the strategy"
            )
        return fitted

    def _allocated(self) -> Buffers:
        """Buffers for `max_length` tokens of the shapes that have arrived."""
        options, block = self.options, self.formats.block
        for side in SIDES:
            self.stores[side].prepare(self._sample(side))
        parts = {side: self.stores[side].named() for side in SIDES}
        fitted = {side: self.tables[side].tensors() for side in SIDES}
        layout = Layout(
            formats=self.formats,
            max_length=self.max_length,
            residual_length=options.residual_length,
            key_parts=tuple(parts["key"]),
            value_parts=tuple(parts["value"]),
            key_tables=tuple(fitted["key"]),
            value_tables=tuple(fitted["value"]),
        )
        slots = -(-(options.residual_length + block) // block)
        tails = [self.tails[side].read() for side in SIDES]
        batch = tails[0].shape[0]

        def zeros(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return allocate(like if dtype is None else like.new_empty((), dtype=dtype), shape).zero_()

        buffers = Buffers(
            layout=layout.model_dump_json(),
            tails=[zeros(tail, *tail.shape[:2], slots, block, tail.shape[3]) for tail in tails],
            real=zeros(tails[0], batch, slots * block, dtype=torch.bool),
            key_parts=list(parts["key"].values()),
            value_parts=list(parts["value"].values()),
            sinks=[zeros(tail, *tail.shape[:2], options.sink_tokens, tail.shape[3]) for tail in tails],
            first=zeros(tails[0], batch, dtype=torch.int64),
            length=zeros(tails[0], dtype=torch.int64),
            blocks=zeros(tails[0], 1, dtype=torch.int32),
            overflowed=zeros(tails[0], dtype=torch.bool),
            key_tables=[compact(tensor) for tensor in fitted["key"].values()],
            value_tables=[compact(tensor) for tensor in fitted["value"].values()],
        )
        for tensor in buffers.tensors():
            # graphs are captured and compiled with these addresses
            torch._dynamo.mark_static_address(tensor)
        return buffers

    def _sample(self, side: Side) -> dict[str, Tensor]:
        """One encoded block, to learn what encoding returns; for the whole batch by shape.

        Raises ValueError where the strategy's own encoder is not the shared one, the only one that steps can call.
        """
        fmt, block, tables = getattr(self.formats, side), self.formats.block, self.tables[side]
        like = self.tails[side].read()
        generator = torch.Generator().manual_seed(0)
        states = torch.randn((1, like.shape[1], block, like.shape[3]), generator=generator).to(like)
        ours = quantize.encode(states, fmt, side, block, None, tables)
        theirs = self.strategy.encode(states, fmt, side, block, None, tables)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise ValueError(
                f"{self.strategy!r} encodes blocks in a way of its own, which a static cache cannot compile; use "
                "PackedCache"
            )
        return {name: tensor.expand(like.shape[0], *tensor.shape[1:]) for name, tensor in ours.items()}


def _alike(held: Tensor, states: Tensor) -> bool:
    """Whether `states [batch, kv_heads, tokens, dim]` go on where `held [batch, kv_heads, ..., dim]` ends."""
    same_shape = held.shape[:2] == states.shape[:2] and held.shape[-1] == states.shape[-1]
    return same_shape and held.dtype == states.dtype and held.device == states.device
