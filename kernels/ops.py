"""Decode steps over preallocated buffers, as operations that `torch.compile` takes into its graph whole.

A step appends its token to every layer and attends over what the layer then holds. All that changes from step to step
lies in tensors on the device, so that one graph serves every step, and a CUDA graph can replay it: no shape depends on
how many tokens are held, and where the device is not the host nothing waits for a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from . import backend, cpu, fused
from .attention import Partial, dense_partial, finish, merge, packed_partial, packed_scores, unrotate
from .format import LayerFormat, Side
from .quantize import Tables, encode
from .rotation import hadamard_rotate

# float32 numbers a chunk of packed blocks may spread to, over batch and heads
CHUNK_NUMBERS = 1 << 20


class Layout(BaseModel):
    """What one layer's buffers mean: plain data, which travels to the operations as a JSON string."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    formats: LayerFormat
    max_length: int
    """Tokens that fit."""
    residual_length: int
    """Newest tokens that stay exact."""
    key_parts: tuple[str, ...]
    """Names of the packed buffers, as `quantize.encode` gives them."""
    value_parts: tuple[str, ...]
    key_tables: tuple[str, ...] = ()
    """Names of the tables that are set."""
    value_tables: tuple[str, ...] = ()


@cache
def _layout(text: str) -> Layout:
    return Layout.model_validate_json(text)


@dataclass(frozen=True, eq=False)
class Buffers:
    """Everything one layer holds, each tensor allocated once and then written in place.

    Token `t` that is exact lies in slot `t % (slots * block)` of the tail: a ring of whole blocks, so that the oldest
    block is one slice. A block is packed at the beginning of the step that follows the one which made it due, the first
    to read it packed.
    """

    layout: str
    """`Layout` as JSON."""
    tails: list[Tensor]
    """Keys and values `[batch, kv_heads, slots, block, dim]` in the model's dtype."""
    real: Tensor
    """Which tokens of the tail are no padding, bool `[batch, slots * block]`."""
    key_parts: list[Tensor]
    """Packed keys, `[batch, kv_heads, blocks that fit, ...]` each; unused blocks are zero."""
    value_parts: list[Tensor]
    sinks: list[Tensor]
    """Exact keys and values `[batch, kv_heads, sink_tokens, dim]` of sinks that are packed."""
    first: Tensor
    """Index of each row's first real token, int64 `[batch]`."""
    length: Tensor
    """Tokens held, int64 scalar."""
    blocks: Tensor
    """Blocks packed, int32 `[1]`."""
    overflowed: Tensor
    """Whether a token came that did not fit, bool scalar. It was not stored."""
    key_tables: list[Tensor]
    value_tables: list[Tensor]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store the keys and values `[batch, kv_heads, 1, dim]` of one token of each row."""
        torch.ops.cachequant.append(
            key,
            value,
            self.tails,
            self.real,
            self.key_parts,
            self.value_parts,
            self.sinks,
            self.first,
            self.length,
            self.blocks,
            self.overflowed,
            self.key_tables,
            self.value_tables,
            self.layout,
        )

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, s_aux: Tensor | None
    ) -> Tensor:
        """Attention of `query [batch, query_heads, 1, head_dim]` over all tokens held.

        mask: bool (False hides) or floats to be added, `[batch or 1, query_heads or 1, 1, keys]`; None hides nothing,
            and what is beyond the keys is hidden. softcap, s_aux: see `core.hf.segments.Scoring`.

        Returns `[batch, 1, query_heads, value_dim]` in the query's dtype.
        """
        return torch.ops.cachequant.attend(
            query,
            mask,
            s_aux,
            self.tails,
            self.key_parts,
            self.value_parts,
            self.sinks,
            self.first,
            self.length,
            self.blocks,
            self.key_tables,
            self.value_tables,
            scaling,
            softcap,
            self.layout,
        )

    def packed(self) -> dict[Side, dict[str, Tensor]]:
        """The packed buffers by side and name."""
        plan = _layout(self.layout)
        return {
            "key": dict(zip(plan.key_parts, self.key_parts, strict=True)),
            "value": dict(zip(plan.value_parts, self.value_parts, strict=True)),
        }

    def tables(self) -> dict[Side, Tables]:
        """The tables by side."""
        return _tables(_layout(self.layout), self.key_tables, self.value_tables)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        numbers = [self.real, self.first, self.length, self.blocks, self.overflowed]
        return [*self.batched(), *numbers[2:], *self.key_tables, *self.value_tables]

    def batched(self) -> list[Tensor]:
        """The tensors whose first dimension is the batch."""
        return [*self.tails, *self.key_parts, *self.value_parts, *self.sinks, self.real, self.first]


def _readable(count: Tensor) -> bool:
    """Whether the host may look at a number and choose: on a GPU it would wait, and no graph could be captured."""
    return count.device.type == "cpu"


# ---- storing ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cachequant::append",
    mutates_args=("tails", "real", "key_parts", "value_parts", "sinks", "length", "blocks", "overflowed"),
    # older torch does not read it from annotations
    schema="(Tensor key, Tensor value, Tensor(a!)[] tails, Tensor(b!) real, Tensor(c!)[] key_parts, "
    "Tensor(d!)[] value_parts, Tensor(e!)[] sinks, Tensor first, Tensor(f!) length, Tensor(g!) blocks, "
    "Tensor(h!) overflowed, Tensor[] key_tables, Tensor[] value_tables, str layout) -> ()",
)
def append(
    key: Tensor,
    value: Tensor,
    tails: list[Tensor],
    real: Tensor,
    key_parts: list[Tensor],
    value_parts: list[Tensor],
    sinks: list[Tensor],
    first: Tensor,
    length: Tensor,
    blocks: Tensor,
    overflowed: Tensor,
    key_tables: list[Tensor],
    value_tables: list[Tensor],
    layout: str,
) -> None:
    """Pack the oldest block of the tail if it is due, then store one token; see `Buffers`."""
    plan = _layout(layout)
    block = plan.formats.block
    due = length - blocks * block == plan.residual_length + block
    parts = {"key": key_parts, "value": value_parts}
    capacity = key_parts[0].shape[2]
    # where the flag cannot be read for nothing, the block is always encoded and kept only if due
    if capacity and (not _readable(due) or bool(due)):
        tables = _tables(plan, key_tables, value_tables)
        slot = (blocks % tails[0].shape[2]).long()
        leaving = [tail.index_select(2, slot).squeeze(2) for tail in tails]
        valid = real.unflatten(1, (-1, block)).index_select(1, slot).squeeze(1)
        valid = _keep_sinks(sinks, leaving, first, blocks * block, due, valid)
        at = blocks.clamp(max=capacity - 1).long()
        for side, states in zip(tables, leaving, strict=True):
            fmt = getattr(plan.formats, side)
            names = plan.key_parts if side == "key" else plan.value_parts
            outputs = dict(zip(names, parts[side], strict=True))
            encode(states, fmt, side, block, valid, tables[side], outputs, at, due.to(torch.int32))
        blocks.add_(due)
    fits = length < plan.max_length
    at = (length % real.shape[1]).view(1)
    for tail, states in zip(tails, (key, value), strict=True):
        flat = tail.flatten(2, 3)
        flat.index_copy_(2, at, torch.where(fits, states, flat.index_select(2, at)))
    real.index_copy_(1, at, real.index_select(1, at) | fits)
    overflowed.logical_or_(~fits)
    length.add_(fits)


@append.register_fake
def _(*arguments: object) -> None:
    return None


def _keep_sinks(
    sinks: list[Tensor], leaving: list[Tensor], first: Tensor, past: Tensor, due: Tensor, valid: Tensor
) -> Tensor:
    """Copy the sinks out of the block that leaves the tail, tokens from `past [1]` on; see `core.sinks.Sinks`.

    Returns which of its tokens statistics may include: `valid [batch, block]` without the sinks.
    """
    count, block = sinks[0].shape[2], leaving[0].shape[2]
    if not count:
        return valid
    local = _sink_positions(first, count) - past
    entering = ((local >= 0) & (local < block) & due)[:, None, :, None]
    for sink, states in zip(sinks, leaving, strict=True):
        index = local.clamp(0, block - 1)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        sink.copy_(torch.where(entering, states.gather(2, index), sink))
    is_sink = torch.arange(block, device=local.device)[None, :, None] == local[:, None, :]
    return valid & ~is_sink.any(-1)


# ---- reading ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cachequant::attend",
    mutates_args=(),
    schema="(Tensor query, Tensor? mask, Tensor? s_aux, Tensor[] tails, Tensor[] key_parts, Tensor[] value_parts, "
    "Tensor[] sinks, Tensor first, Tensor length, Tensor blocks, Tensor[] key_tables, Tensor[] value_tables, "
    "float scaling, float? softcap, str layout) -> Tensor",
)
def attend(
    query: Tensor,
    mask: Tensor | None,
    s_aux: Tensor | None,
    tails: list[Tensor],
    key_parts: list[Tensor],
    value_parts: list[Tensor],
    sinks: list[Tensor],
    first: Tensor,
    length: Tensor,
    blocks: Tensor,
    key_tables: list[Tensor],
    value_tables: list[Tensor],
    scaling: float,
    softcap: float | None,
    layout: str,
) -> Tensor:
    """Attention of one query per row over packed blocks, sinks and tail; see `Buffers.attend`."""
    plan = _layout(layout)
    segments = _Segments(
        plan,
        tails,
        dict(zip(plan.key_parts, key_parts, strict=True)),
        dict(zip(plan.value_parts, value_parts, strict=True)),
        _tables(plan, key_tables, value_tables),
        sinks,
        first,
        length,
        blocks,
        None if mask is None else _padded(mask, plan.max_length),
    )
    mixed = _fused(query, segments, scaling, softcap, s_aux)
    if mixed is None:
        mixed = _reference(query, segments, scaling, softcap, s_aux)
    return mixed.transpose(1, 2).contiguous()


@attend.register_fake
def _(query: Tensor, mask: Tensor | None, s_aux: Tensor | None, tails: list[Tensor], *others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], tails[1].shape[-1])


class _Segments(NamedTuple):
    """What a step attends to; tensors as in `Buffers`."""

    plan: Layout
    tails: list[Tensor]
    key: dict[str, Tensor]
    value: dict[str, Tensor]
    tables: dict[Side, Tables]
    sinks: list[Tensor]
    first: Tensor
    length: Tensor
    blocks: Tensor
    mask: Tensor | None
    """`[batch or 1, query_heads or 1, 1, max_length or more]`."""

    @property
    def packed_tokens(self) -> Tensor:
        """`[1]`"""
        return self.blocks * self.plan.formats.block

    def tail(self) -> tuple[Tensor, Tensor]:
        """The token in each slot of the tail, `[slots]`, and whether it is there and not packed."""
        slots = torch.arange(self.tails[0].shape[2:4].numel(), device=self.length.device)
        newest = self.length - 1
        positions = newest - (newest - slots) % len(slots)
        return positions.clamp(min=0), positions >= self.packed_tokens

    def packed_sinks(self) -> tuple[Tensor, Tensor]:
        """Positions of the sinks and which of them are packed, `[batch, sink_tokens]`."""
        positions = _sink_positions(self.first, self.sinks[0].shape[2])
        return positions.clamp(max=self.plan.max_length - 1), positions < self.packed_tokens

    def beyond_sinks(self, positions: Tensor) -> Tensor | None:
        """Which tokens no sink replaces or follows, `[batch, n]`; None: all."""
        count = self.sinks[0].shape[2]
        return positions >= self.first[:, None] + count if count else None

    def masked(self, positions: Tensor) -> Tensor | None:
        """The mask of the tokens `positions [n]` or `[batch, n]`: `[batch or 1, query_heads or 1, 1, n]`."""
        if self.mask is None:
            return None
        if positions.ndim == 1:
            return self.mask.index_select(-1, positions)
        batch, heads = len(positions), self.mask.shape[1]
        index = positions[:, None, None].expand(-1, heads, 1, -1)
        return self.mask.expand(batch, -1, -1, -1).gather(-1, index)


def _fused(
    query: Tensor, segments: _Segments, scaling: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor | None:
    """`[batch, query_heads, 1, value_dim]` by the Triton kernels; None where they do not serve."""
    device = query.device
    if not backend.triton_serves(device):
        return None
    plan, mask = segments.plan, segments.mask
    # blocks that are exact are what the tail is: keys and values
    exact_blocks = plan.formats.key.codes == plan.formats.value.codes == "exact"
    problem = None
    if not exact_blocks:
        problem = fused.unserved(plan.formats, query.shape[-1], segments.tails[1].shape[-1])  # type: ignore[arg-type]
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] > 1):
        problem = "an attention mask that is added, or differs by head"
    if query.dtype == torch.float64:
        problem = "float64"
    if problem is not None:
        backend.warn_once(f"packed attention runs on the slower torch path, not on Triton: {problem}")
        return None

    def visible(positions: Tensor, seen: Tensor | None) -> Tensor | None:
        allowed = segments.masked(positions)
        if allowed is None:
            return None if seen is None else seen.reshape(-1, 1, seen.shape[-1])
        allowed = allowed.squeeze(1)
        return allowed if seen is None else allowed & seen.reshape(-1, 1, seen.shape[-1])

    positions, there = segments.tail()
    key, value = (tail.flatten(2, 3) for tail in segments.tails)
    exact = [fused.ExactSegment(key, value, visible(positions, there))]
    key, value = segments.sinks
    if key.shape[2]:
        exact.append(fused.ExactSegment(key, value, visible(*segments.packed_sinks())))
    packed = None
    capacity = next(iter(segments.key.values())).shape[2]
    if capacity:
        positions = torch.arange(capacity * plan.formats.block, device=device)
        seen = visible(positions, segments.beyond_sinks(positions))
        if exact_blocks:
            key, value = (side["exact"].flatten(2, 3) for side in (segments.key, segments.value))
            exact.append(fused.ExactSegment(key, value, seen, held=segments.packed_tokens))
        else:
            packed = fused.PackedSegment(
                segments.key, segments.value, plan.formats, segments.tables, visible=seen, held=segments.blocks
            )
    return fused.attend(query, packed, exact, scaling, softcap, s_aux)


def _reference(
    query: Tensor, segments: _Segments, scaling: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """`[batch, query_heads, 1, value_dim]` by torch."""
    kv_heads = segments.tails[0].shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = (query.to(dtype) * scaling).reshape(query.shape[0], kv_heads, -1, query.shape[-1])

    def hide(scores: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = segments.masked(positions)
        if mask is not None:
            # one query: rows are query heads
            mask = mask if mask.shape[1] == 1 else mask.squeeze(2).unflatten(1, (kv_heads, -1))
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
        return scores if seen is None else scores.masked_fill(~seen.reshape(-1, 1, 1, seen.shape[-1]), -torch.inf)

    def exact(states: list[Tensor], positions: Tensor, seen: Tensor) -> Partial:
        key, value = (tensor.to(dtype) for tensor in states)
        return dense_partial(hide(rows @ key.transpose(-1, -2), positions, seen), value)

    total = exact([tail.flatten(2, 3) for tail in segments.tails], *segments.tail())
    if segments.sinks[0].shape[2]:
        total = merge(total, exact(segments.sinks, *segments.packed_sinks()))
    packed = _packed_partial(rows, segments, hide, rounded=query.dtype == torch.bfloat16)
    total = total if packed is None else merge(total, packed)
    sink = None if s_aux is None else s_aux.reshape(kv_heads, -1)
    return finish(total, sink).flatten(1, 2).unsqueeze(2).to(query.dtype)


def _packed_partial(
    rows: Tensor, segments: _Segments, hide: Callable[[Tensor, Tensor, Tensor | None], Tensor], rounded: bool
) -> Partial | None:
    """Partial over the packed blocks, sinks and what precedes them left out.

    rounded: whether weights may be rounded to bfloat16, as SDPA does in models of that dtype.
    """
    formats, tables = segments.plan.formats, segments.tables
    block = formats.block
    capacity = next(iter(segments.key.values())).shape[2]
    held = int(segments.blocks) if _readable(segments.blocks) else capacity
    rows = hadamard_rotate(rows, formats.key.basis(rows.shape[-1])) if formats.key.packed else rows
    value_dim = segments.tails[1].shape[-1]
    fast_keys = cpu.serves(rows, formats.key, "key", tables["key"])
    fast_values = cpu.serves(rows, formats.value, "value", tables["value"])
    scores_of = cpu.packed_scores if fast_keys else packed_scores
    partial_of = partial(cpu.packed_partial, rounded=rounded) if fast_values else packed_partial
    widest = rows.shape[2] if fast_keys and fast_values else max(rows.shape[2:])
    step = max(1, CHUNK_NUMBERS // (rows.shape[0] * rows.shape[1] * widest) // block)
    total = None
    for start in range(0, held, step):
        stop = min(start + step, held)
        positions = torch.arange(start * block, stop * block, device=rows.device)
        seen, beyond = positions < segments.packed_tokens, segments.beyond_sinks(positions)
        key, value = ({name: t[:, :, start:stop] for name, t in d.items()} for d in (segments.key, segments.value))
        scores = scores_of(rows, key, formats.key, block, tables["key"])
        scores = hide(scores, positions, seen if beyond is None else seen & beyond)
        chunk = partial_of(scores, value, formats.value, value_dim, block, tables["value"])
        total = chunk if total is None else merge(total, chunk)
    return None if total is None else unrotate(total, formats.value)


def _padded(mask: Tensor, keys: int) -> Tensor:
    """`mask [..., n]` of at least `keys` keys, the missing ones hidden."""
    nothing = False if mask.dtype == torch.bool else -torch.inf
    return torch.nn.functional.pad(mask, (0, max(0, keys - mask.shape[-1])), value=nothing)


def _sink_positions(first: Tensor, count: int) -> Tensor:
    return first[:, None] + torch.arange(count, device=first.device)


def _tables(plan: Layout, key: list[Tensor], value: list[Tensor]) -> dict[Side, Tables]:
    return {
        "key": Tables.of(**dict(zip(plan.key_tables, key, strict=True))),
        "value": Tables.of(**dict(zip(plan.value_tables, value, strict=True))),
    }
