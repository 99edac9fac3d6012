"""Attention over a packed layer: sinks, packed chunks and exact tail, each a partial result, merged."""

from functools import partial as bound
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels import cpu
from ...kernels.attention import Partial, dense_partial, finish, merge, packed_partial, packed_scores, unrotate
from ...kernels.rotation import hadamard_rotate
from .handles import LazyStates
from .masks import Visibility

if TYPE_CHECKING:
    from .blocks import BlockLayer

# float32 numbers a chunk may spread to, over batch and heads: large enough to amortise a call, small enough for caches;
# where codes are not spread to states, it is its scores that count
CHUNK_NUMBERS = 1 << 20


class Scoring(NamedTuple):
    """What a forward makes of its dot products."""

    visibility: Visibility
    scaling: float
    softcap: float | None = None
    """Scores are bounded to `(-softcap, softcap)` (gemma2)."""
    s_aux: Tensor | None = None
    """Logits of learned sinks, `[query_heads]` (gpt-oss)."""

    def scores(self, rows: Tensor, key: Tensor, queries: int) -> Tensor:
        """`[batch, kv_heads, query_heads_per_kv_head, queries, keys]` of folded rows, nothing hidden yet."""
        return self.cap((rows @ key.to(rows.dtype).transpose(-1, -2)).unflatten(2, (-1, queries)))

    def cap(self, scores: Tensor) -> Tensor:
        """Scores within the softcap, if there is one."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def finish(self, partial: Partial, kv_heads: int, query: Tensor) -> Tensor:
        """Normalised output `[batch, query_heads, queries, value_dim]` in the query's dtype."""
        sink = self.sink(kv_heads, query.shape[2])
        return finish(partial, sink).reshape(*query.shape[:3], partial.mix.shape[-1]).to(query.dtype)

    def sink(self, kv_heads: int, queries: int) -> Tensor | None:
        """Logits of learned sinks `[kv_heads, R]`, if there are any."""
        if self.s_aux is None:
            return None
        return self.s_aux.reshape(kv_heads, -1, 1).expand(-1, -1, queries).flatten(1)


def attend_packed(layer: "BlockLayer", query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
    """Attention of `query [batch, query_heads, queries, head_dim]` over sinks, packed blocks and the exact tokens.

    key, value: handles with something packed. Packed blocks are walked in chunks, so no dequantized copy of the cache
    ever exists.
    """
    queries = query.shape[2]
    rows = fold(query, layer.kv_heads, scoring.scaling)
    total = _packed_segment(layer, key.start, rows, queries, scoring, rounded=query.dtype == torch.bfloat16)
    sinks = layer.present_sinks(key.start)
    if sinks is not None:
        positions, present, sink_key, sink_value = sinks
        scores = scoring.scores(rows, sink_key, queries)
        scores = scoring.visibility.hide_at(scores, positions).masked_fill(~present[:, None, None, None], -torch.inf)
        total = merge(total, dense_partial(scores.flatten(2, 3), sink_value.to(rows.dtype)))
    exact = dense_segment(rows, key.rotated_exact(), value.exact, key.start, queries, scoring)
    return scoring.finish(merge(total, exact), layer.kv_heads, query)


def fold(query: Tensor, kv_heads: int, scaling: float) -> Tensor:
    """Query heads of a kv head and query positions as one row axis, scaled: `[batch, kv_heads, R, head_dim]`."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (query.to(dtype) * scaling).reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def dense_segment(rows: Tensor, key: Tensor, value: Tensor, start: int, queries: int, scoring: Scoring) -> Partial:
    """Partial over exact keys and values, the first of which is token `start`."""
    scores = scoring.visibility.hide(scoring.scores(rows, key, queries), start)
    return dense_partial(scores.flatten(2, 3), value.to(rows.dtype))


def _packed_segment(
    layer: "BlockLayer", packed: int, rows: Tensor, queries: int, scoring: Scoring, rounded: bool
) -> Partial:
    """Partial over the first `packed` tokens, all of them in packed blocks.

    rounded: whether weights may be rounded to bfloat16, as SDPA does in models of that dtype.
    """
    formats = layer.formats
    # before RoPE, keys must come back to their own basis to be rotated; after it, the query goes to theirs
    direct = formats.key.codes != "custom" and formats.key.rope == "post"
    packed_rows = hadamard_rotate(rows, formats.key.basis(rows.shape[-1])) if direct and formats.key.packed else rows
    fast_keys = direct and cpu.serves(rows, formats.key, "key", layer.tables["key"])
    fast_values = cpu.serves(rows, formats.value, "value", layer.tables["value"])
    scores_of = cpu.packed_scores if fast_keys else packed_scores
    partial_of = bound(cpu.packed_partial, rounded=rounded) if fast_values else packed_partial
    total = None
    widest = rows.shape[2] if fast_keys and fast_values else max(rows.shape[2:])
    tokens = CHUNK_NUMBERS // (rows.shape[0] * rows.shape[1] * widest)
    for chunk in layer.chunks(packed, tokens):
        if direct:
            scores = scores_of(packed_rows, chunk.key, formats.key, formats.block, layer.tables["key"])
        else:
            scores = rows @ layer.decode_chunk(chunk, "key", rows.dtype).transpose(-1, -2)
        scores = scoring.visibility.hide(scoring.cap(scores.unflatten(2, (-1, queries))), chunk.start)
        hidden = layer.sinks.covers(chunk.start, chunk.stop)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None, None], -torch.inf)
        scores = scores.flatten(2, 3)
        if formats.value.codes == "custom":
            partial = dense_partial(scores, layer.decode_chunk(chunk, "value", rows.dtype))
        else:
            partial = partial_of(
                scores, chunk.value, formats.value, layer.value_dim, formats.block, layer.tables["value"]
            )
        total = partial if total is None else merge(total, partial)
    assert total is not None  # called only when blocks are held
    return unrotate(total, formats.value)
