"""Attention over a packed layer: sinks, packed chunks and exact tail, each a partial result, merged."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.attention import Partial, dense_partial, finish, merge, packed_partial, packed_scores, unrotate
from ...kernels.rotation import hadamard_rotate
from .handles import LazyStates
from .masks import Visibility

if TYPE_CHECKING:
    from .layer import PackedLayer

# float32 numbers a chunk may spread to, over batch and heads: large enough to amortise a call, small enough for caches
CHUNK_NUMBERS = 1 << 20


def attend_packed(
    query: Tensor,
    key: LazyStates,
    value: LazyStates,
    visibility: Visibility,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of `query [batch, query_heads, queries, head_dim]` over sinks, packed blocks and the exact tokens.

    key, value: handles with something packed. Packed blocks are walked in chunks, so no dequantized copy of the cache
    ever exists.
    """
    layer, queries = key.layer, query.shape[2]
    rows = fold(query, layer.kv_heads, scaling)
    total = _packed_segment(layer, key.start, rows, visibility, queries, softcap)
    sinks = layer.present_sinks(key.start)
    if sinks is not None:
        positions, present, sink_key, sink_value = sinks
        scores = capped(_scores(rows, sink_key, queries), softcap)
        scores = visibility.hide_at(scores, positions).masked_fill(~present[:, None, None, None], -torch.inf)
        total = merge(total, dense_partial(scores.flatten(2, 3), sink_value.to(rows.dtype)))
    exact = dense_segment(rows, key.rotated_exact(), value.exact, visibility, key.start, queries, softcap)
    total = merge(total, exact)
    return unfold(finish(total, sink_rows(s_aux, layer.kv_heads, queries)), query)


def fold(query: Tensor, kv_heads: int, scaling: float) -> Tensor:
    """Query heads of a kv head and query positions as one row axis, scaled: `[batch, kv_heads, R, head_dim]`."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (query.to(dtype) * scaling).reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def unfold(rows: Tensor, query: Tensor) -> Tensor:
    """The inverse of `fold` for outputs: `[batch, query_heads, queries, value_dim]` in the query's dtype."""
    return rows.reshape(*query.shape[:3], rows.shape[-1]).to(query.dtype)


def sink_rows(s_aux: Tensor | None, kv_heads: int, queries: int) -> Tensor | None:
    """Learned sink logits `[query_heads]` per row: `[kv_heads, R]`."""
    return None if s_aux is None else s_aux.reshape(kv_heads, -1, 1).expand(-1, -1, queries).flatten(1)


def dense_segment(
    rows: Tensor, key: Tensor, value: Tensor, visibility: Visibility, start: int, queries: int, softcap: float | None
) -> Partial:
    """Partial over exact keys and values, the first of which is token `start`."""
    scores = visibility.hide(capped(_scores(rows, key, queries), softcap), start)
    return dense_partial(scores.flatten(2, 3), value.to(rows.dtype))


def _packed_segment(
    layer: "PackedLayer", packed: int, rows: Tensor, visibility: Visibility, queries: int, softcap: float | None
) -> Partial:
    """Partial over the first `packed` tokens, all of them in packed blocks."""
    formats = layer.formats
    rotated = formats.key.packed and formats.key.rotation == "hadamard"
    # before RoPE, keys must come back to their own basis to be rotated; after it, the query goes to theirs
    direct = formats.key.codes != "custom" and formats.key.rope == "post"
    packed_rows = hadamard_rotate(rows) if rotated and direct else rows
    total = None
    tokens = CHUNK_NUMBERS // (rows.shape[0] * rows.shape[1] * max(rows.shape[2:]))
    for chunk in layer.chunks(packed, tokens):
        if direct:
            scores = packed_scores(packed_rows, chunk.key, formats.key, formats.block, layer.tables["key"])
        else:
            scores = rows @ layer.decode_chunk(chunk, "key", rows.dtype).transpose(-1, -2)
        scores = visibility.hide(capped(scores.unflatten(2, (-1, queries)), softcap), chunk.start)
        hidden = layer.sinks.covers(chunk.start, chunk.stop)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None, None], -torch.inf)
        scores = scores.flatten(2, 3)
        if formats.value.codes == "custom":
            partial = dense_partial(scores, layer.decode_chunk(chunk, "value", rows.dtype))
        else:
            partial = packed_partial(
                scores, chunk.value, formats.value, layer.value_dim, formats.block, layer.tables["value"]
            )
        total = partial if total is None else merge(total, partial)
    assert total is not None  # called only when blocks are held
    return unrotate(total, formats.value)


def _scores(rows: Tensor, key: Tensor, queries: int) -> Tensor:
    """`[batch, kv_heads, query_heads_per_kv_head, queries, keys]`."""
    return (rows @ key.to(rows.dtype).transpose(-1, -2)).unflatten(2, (-1, queries))


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores bounded to `(-softcap, softcap)`, if there is one."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
